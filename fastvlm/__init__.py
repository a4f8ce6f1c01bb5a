"""fastvlm: fused kernels for encoder-decoder vision-language models."""

from fastvlm import nn, ops
from fastvlm.layout import Layout
from fastvlm.ops.dispatch import use
from fastvlm.patching.patch import PatchError, patch, patched, unpatch

__all__ = ["Layout", "PatchError", "nn", "ops", "patch", "patched", "unpatch", "use"]
