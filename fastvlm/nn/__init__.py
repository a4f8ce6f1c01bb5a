"""Drop-in modules over the ops: no new parameters, the state_dict names of transformers."""

from fastvlm.nn.attention import CrossAttention, SelfAttention
from fastvlm.nn.linear import Linear
from fastvlm.nn.mlp import GegluMLP, GeluMLP
from fastvlm.nn.norm import RMSNorm

__all__ = ["CrossAttention", "GegluMLP", "GeluMLP", "Linear", "RMSNorm", "SelfAttention"]
