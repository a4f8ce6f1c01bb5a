"""The demo: one photo captioned with and without fastvlm (``make demo``)."""
