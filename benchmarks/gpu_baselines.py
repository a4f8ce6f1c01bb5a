"""What users run on a GPU instead: flash-attn, PyTorch's varlen and FlexAttention, Liger, CCE.

Each is optional; one that cannot be had, or cannot do a case, is left out and named in the results
file. All of them get packed rows: the readers of an image as one segment, so that an image's keys
are shared by them as by ours.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Function
from fastvlm import Layout

Attend = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


@functools.cache
def _imported(baseline: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension built for another PyTorch fails in any way
        measure.MISSING[baseline] = f"{module}: {type(error).__name__}: {error}"
        return None


def attention(causal: bool, scale: float, softcap: float | None) -> dict[str, Attend]:
    """(q, k, v, layout) -> out, for each library that can; readers of an image stand together."""
    sides: dict[str, Attend] = {"flex": _flex(causal, scale, softcap)}
    flash = _imported("flash-attn", "flash_attn")
    if flash is not None:
        sides["flash-attn"] = lambda q, k, v, layout: flash.flash_attn_varlen_func(
            q, k, v, *_offsets(layout), softmax_scale=scale, causal=causal, softcap=softcap or 0.0
        )
    varlen = _imported("torch varlen", "torch.nn.attention.varlen")
    if softcap is not None:
        measure.MISSING.setdefault("torch varlen", "it has no softcap")
    elif varlen is not None:
        window = (-1, 0) if causal else (-1, -1)
        sides["torch varlen"] = lambda q, k, v, layout: varlen.varlen_attn(
            q, k, v, *_offsets(layout), scale=scale, window_size=window, enable_gqa=True
        )
    return sides


def _offsets(layout: Layout) -> tuple[Tensor, Tensor, int, int]:
    return layout.reader_offsets, layout.kv_offsets, layout.max_readers, layout.max_kv


def _flex(causal: bool, scale: float, softcap: float | None) -> Attend:
    """FlexAttention over the packed rows: one mask of documents, made once for a layout."""
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def mask_of(layout: Layout) -> Any:
        device = layout.device
        rows = torch.arange(layout.num_images, device=device)
        of_row = rows.repeat_interleave(layout.reader_offsets.diff())
        of_key = rows.repeat_interleave(layout.kv_offsets.diff())

        def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = of_row[i] == of_key[j]
            return seen & (i >= j) if causal else seen

        sizes = (layout.num_tokens, layout.num_kv_tokens)
        return flex.create_block_mask(same, None, None, *sizes, device=str(device))

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if id(layout) not in masks:
            masks[id(layout)] = mask_of(layout)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(
            q, k, v, score_mod=None if softcap is None else capped, block_mask=masks[id(layout)],
            scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1)

    return run


def rms_norm(eps: float) -> dict[str, Function]:
    """(x, weight), Gemma's (1 + w)."""
    liger = _imported("liger", "liger_kernel.ops.rms_norm")
    if liger is None:
        return {}
    # offset 1, Gemma's casting, and not in place: the gradient given to it is used by others too
    return {"liger": lambda x, w: liger.LigerRMSNormFunction.apply(x, w, eps, 1.0, "gemma", False)}


def geglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *_: Any) -> Tensor:
    """Liger's activation between PyTorch's products."""
    function = torch.nn.functional.linear
    liger = importlib.import_module("liger_kernel.ops.geglu")
    product = liger.LigerGELUMulFunction.apply(function(x, w_gate), function(x, w_up))
    return function(product, w_down)


def geglu_mlp() -> dict[str, Function]:
    return {} if _imported("liger", "liger_kernel.ops.geglu") is None else {"liger": geglu}


def rope() -> dict[str, Function]:
    """(q, k, cos, sin) of packed rows, as a batch of one."""
    liger = _imported("liger", "liger_kernel.ops.rope")
    if liger is None:
        return {}

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # it turns its arguments in place where they are contiguous
        q, k = (x.clone().transpose(0, 1).unsqueeze(0) for x in (q, k))
        turned = liger.LigerRopeFunction.apply(q, k, cos.unsqueeze(0), sin.unsqueeze(0))
        q, k = (x[0].transpose(0, 1) for x in turned)
        return q, k

    return {"liger": run}


def cross_entropy(softcap: float | None, ignore_index: int) -> dict[str, Function]:
    """(h, weight, labels) -> mean loss."""
    sides: dict[str, Function] = {}
    cce = _imported("cut-cross-entropy", "cut_cross_entropy")
    if cce is not None:
        sides["cut-cross-entropy"] = lambda h, weight, labels: cce.linear_cross_entropy(
            h, weight, labels, softcap=softcap, ignore_index=ignore_index
        )
    liger = _imported("liger", "liger_kernel.transformers.fused_linear_cross_entropy")
    if liger is not None:
        loss = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, softcap=softcap)
        sides["liger"] = lambda h, weight, labels: loss(weight, h, labels)
    return sides
