"""Checkpoints from anywhere: `fastvlm.load`, and `fastvlm.save_published` back.

Layouts: transformers' own and `fastvlm.florenz`'s; Microsoft's Florence-2, as its remote code
stores it; and what was published with arXiv 2503.09443. No code of a checkpoint is run.
"""
