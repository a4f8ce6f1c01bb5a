"""What other libraries do not promise: each private or unstable name that fastvlm uses is behind
one function here, with the versions that it is right for.

`versions`: which versions fastvlm is tested on, and what is said or refused elsewhere. `pytorch`,
`hf`, `attentions` and `targets` (transformers): the names themselves. Those of transformers import
it where a function is called.

tests/test_compat.py checks each of these on the versions that are installed; ``make matrix`` runs
that on all supported ones.
"""
