"""Blackwell: compute capability 10 and 12."""

from fastvlm.triton.configs import Table

ATTENTION: Table = {}

MLP: Table = {}

LOSS: Table = {}
