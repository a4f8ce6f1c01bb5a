"""Attention for models that are not patched, under transformers' own name for it:
``attn_implementation="fastvlm"`` after `fastvlm.register_attention`.

`masks` finds out what a mask says, `attention` computes, `register` makes both known.
"""
