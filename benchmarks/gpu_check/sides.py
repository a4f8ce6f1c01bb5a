"""What an op is timed against on a GPU, beside the sides of benchmarks/micro.

Sides that compile for seconds come last: where the time is short they are left out, by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_baselines, kinds
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import (
    test_attention,
    test_attention_training,
    test_linear,
    test_loss,
    test_mlp,
    test_norm,
    test_rope,
)

SLOW = ("torch.compile", "flex", "flex, images apart")


@dataclass(frozen=True)
class Work:
    """A case and all its sides. comparable: what makes a side's results those of ours."""

    case: kinds.Case
    operands: Callable[[], Operands]
    functions: Callable[[], dict[str, Function]]
    comparable: Callable[[str], Function] = lambda side: lambda result: result


def work(case: kinds.Case, dtype: torch.dtype, device: str) -> Work:
    if isinstance(case, kinds.AttentionCase):
        return Work(
            case, lambda: test_attention.operands(case, dtype, device),
            lambda: {**test_attention.functions(case, device), **_of_step(case)},
        )  # fmt: skip
    if isinstance(case, kinds.CaptionsCase):
        padded, same = test_attention_training.packed_results(case), lambda result: result
        return Work(
            case, lambda: test_attention_training.operands(case, dtype, device),
            lambda: test_attention_training.functions(case, device),
            lambda side: padded if side in ("sdpa", "eager", "torch.compile") else same,
        )  # fmt: skip
    if isinstance(case, kinds.LossCase):
        return Work(
            case, lambda: test_loss.loss_operands(case, dtype, device),
            lambda: test_loss.loss_functions(case, device) if case.softcap else _plain_loss(device),
        )  # fmt: skip
    if isinstance(case, kinds.TopkCase):
        return Work(case, lambda: test_loss.head(case, dtype, device),
                    lambda: test_loss.topk_functions(case))  # fmt: skip
    if isinstance(case, kinds.LinearCase):
        from fastvlm import ops

        return Work(case, lambda: test_linear.operands(case, dtype, device),
                    lambda: {"torch": F.linear, "fastvlm": ops.linear})  # fmt: skip
    floor: Any = {
        kinds.MlpCase: test_mlp, kinds.NormCase: test_norm, kinds.RopeCase: test_rope
    }[type(case)]  # type: ignore[index]  # fmt: skip
    options = {} if floor is not test_mlp else {"sessions": ()}
    return Work(case, lambda: floor.operands(case, dtype, device),
                lambda: floor.functions(case, device=device, **options))  # fmt: skip


def _of_step(case: kinds.AttentionCase) -> dict[str, Function]:
    """A step's attention without a copy of an image's keys for each beam: they are read from a
    view of stride 0, or the beams are the query rows of one batch entry."""
    sides: dict[str, Function] = {}
    if case.softcap is not None:
        return {"eager, beams as rows": lambda *x: _joined(case, _eager(case), x)}
    if case.images == 1:
        sides["sdpa, expanded"] = lambda *x: _expanded(case, x)
    sides["sdpa, beams as rows"] = lambda *x: _joined(case, _sdpa(case), x)
    if torch.cuda.is_available():
        sides["cuDNN, beams as rows"] = lambda *x: _joined(case, _sdpa(case, "CUDNN_ATTENTION"), x)
    return sides


def _of_images(case: kinds.AttentionCase, x: Tensor) -> Tensor:
    """[keys of all images, heads, dim] -> [images, heads, keys, dim], a view."""
    return x.view(case.images, case.keys, case.kv_heads, case.head_dim).transpose(1, 2)


def _expanded(case: kinds.AttentionCase, x: Operands) -> Tensor:
    q, k, v = x[:3]
    k, v = (_of_images(case, t).expand(case.beams, -1, -1, -1) for t in (k, v))
    return _sdpa(case)(q[:, :, None], k, v)[:, :, 0]


def _joined(case: kinds.AttentionCase, attend: Function, x: Operands) -> Tensor:
    q, k, v = x[:3]
    rows = q.view(case.images, case.beams, case.heads, case.head_dim).transpose(1, 2)
    out = attend(rows, _of_images(case, k), _of_images(case, v))
    return out.transpose(1, 2).reshape(q.shape)


def _sdpa(case: kinds.AttentionCase, backend: str | None = None) -> Function:
    gqa = case.heads != case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _only(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    return attend


def _only(backend: str | None) -> AbstractContextManager[Any]:
    from contextlib import nullcontext

    if backend is None:
        return nullcontext()
    attention = importlib.import_module("torch.nn.attention")
    chosen: AbstractContextManager[Any] = attention.sdpa_kernel(
        getattr(attention.SDPBackend, backend)
    )
    return chosen


def _eager(case: kinds.AttentionCase) -> Function:
    return lambda q, k, v: test_attention.eager(q, k, v, None, case.softcap)


def _plain_loss(device: str) -> dict[str, Function]:
    """Without a softcap, where PyTorch has a function of its own."""
    from fastvlm import ops

    ignored = test_loss.IGNORED

    def eager(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), labels, ignore_index=ignored)

    sides: dict[str, Function] = {"eager": eager}
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        sides["F.linear_cross_entropy"] = lambda h, weight, labels: fused(
            h, weight, labels, ignore_index=ignored
        )
    if device == "cuda":
        sides |= gpu_baselines.cross_entropy(None, ignored)
    sides["fastvlm"] = ops.linear_cross_entropy
    return {name: trained(side, (0, 1)) for name, side in sides.items()}
