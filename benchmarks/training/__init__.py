"""A training step of the reference workload: transformers eager against a patched model.

``python -m benchmarks.training`` times and measures memory, ``python -m benchmarks.training.drift``
compares a hundred steps, ``python -m benchmarks.training.counted`` counts the true sizes.
"""
