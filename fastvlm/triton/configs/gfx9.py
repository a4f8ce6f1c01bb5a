"""AMD CDNA: gfx90a and gfx942."""

from fastvlm.triton.configs import Case, Config, Table

ATTENTION: Table = {}

MLP: Table = {
    name: [Case([Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "SLICES": 2})])]
    for name in ("geglu_forward", "geglu_backward", "gelu_forward", "gelu_backward")
}
MLP["low_precision_linear"] = [Case([Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8})])]

LOSS: Table = {}
