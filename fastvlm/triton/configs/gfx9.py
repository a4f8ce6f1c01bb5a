"""AMD CDNA: gfx90a and gfx942."""

from fastvlm.triton.configs import Table

ATTENTION: Table = {}

MLP: Table = {}

LOSS: Table = {}
