"""A loss without logits: what a call with labels asks of the modules inside it."""
