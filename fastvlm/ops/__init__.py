"""The ops: public function, checks, dispatch to a backend, autograd."""

import fastvlm.cpu
import fastvlm.cuda
import fastvlm.flash
import fastvlm.triton  # noqa: F401 - each backend registers its kernels
from fastvlm.ops.attention import cached_attention, cross_attention, self_attention
from fastvlm.ops.bf16 import bf16_gelu_mlp, bf16_linear
from fastvlm.ops.int8 import int8_gelu_mlp, int8_linear
from fastvlm.ops.loss import linear_cross_entropy, linear_topk
from fastvlm.ops.merge import merge_attention
from fastvlm.ops.mlp import geglu_mlp, gelu_mlp, linear, low_precision_linear, quantize_rows
from fastvlm.ops.norm import residual_layer_norm, residual_rms_norm, rms_norm
from fastvlm.ops.residual import residual_gelu_mlp, residual_linear
from fastvlm.ops.rope import rope
from fastvlm.ops.vision import channel_attention, depthwise_conv_norm, window_attention

__all__ = [
    "bf16_gelu_mlp",
    "bf16_linear",
    "cached_attention",
    "channel_attention",
    "cross_attention",
    "depthwise_conv_norm",
    "geglu_mlp",
    "gelu_mlp",
    "int8_gelu_mlp",
    "int8_linear",
    "linear",
    "linear_cross_entropy",
    "linear_topk",
    "low_precision_linear",
    "merge_attention",
    "quantize_rows",
    "residual_gelu_mlp",
    "residual_layer_norm",
    "residual_linear",
    "residual_rms_norm",
    "rms_norm",
    "rope",
    "self_attention",
    "window_attention",
]
