"""Ampere and Ada: compute capability 8."""

from fastvlm.triton.configs import Table

ATTENTION: Table = {}

MLP: Table = {}

LOSS: Table = {}
