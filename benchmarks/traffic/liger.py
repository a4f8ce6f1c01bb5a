"""transformers' layers with Liger-Kernel's kernels: what its own patch of Gemma-2 puts in.

RMSNorm, GeGLU and RoPE of Gemma-2 come from ``apply_liger_kernel_to_gemma2``. Liger has no patch of
BART; its LayerNorm fits there, and is put in. Attention, dropout, the erf GELU and the residual
sums stay transformers'.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from torch import nn
from transformers.models.gemma2 import modeling_gemma2


def missing() -> str | None:
    """Why nothing can be counted; None where Liger-Kernel and Triton are there."""
    for package in ("triton", "liger_kernel.transformers"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported: {error}"
    return None


def version() -> str | None:
    """Of the package; None where there is none."""
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Gemma-2's classes and functions are Liger's, for layers made and called inside."""
    from liger_kernel.transformers import apply_liger_kernel_to_gemma2

    before = dict(vars(modeling_gemma2))
    try:
        apply_liger_kernel_to_gemma2(cross_entropy=False, fused_linear_cross_entropy=False)
        yield
    finally:
        vars(modeling_gemma2).update(before)


def with_layer_norms(layer: Any) -> Any:
    """The same layer, every LayerNorm of which is Liger's."""
    from liger_kernel.transformers import LigerLayerNorm

    for module in list(layer.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.LayerNorm:
                width = norm.normalized_shape[0]
                setattr(module, name, LigerLayerNorm(width, eps=norm.eps, bias=True))
    return layer
