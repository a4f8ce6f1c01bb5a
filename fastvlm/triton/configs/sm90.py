"""Hopper: compute capability 9."""

from fastvlm.triton.configs import Table

ATTENTION: Table = {}

MLP: Table = {}

LOSS: Table = {}
