"""The output head over a large vocabulary: cross-entropy in training, top-k in decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import engines, gpu_baselines, memory
from benchmarks.cases import LOSS, TOPK
from benchmarks.kinds import LossCase, TopkCase
from benchmarks.measure import Function, Operands, trained
from benchmarks.micro import each
from fastvlm import ops

IGNORED = -100


def head(case: LossCase | TopkCase, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    h = torch.randn(case.rows, case.width, dtype=dtype, device=device)
    weight = torch.randn(case.vocabulary, case.width, dtype=dtype, device=device)
    # logits of a few units, where the softcap bends but does not saturate
    return h, weight.mul_(4 * case.width**-0.5)


def loss_operands(case: LossCase, dtype: torch.dtype, device: str) -> Operands:
    """h, weight, labels, the gradient of the loss."""
    labels = torch.randint(case.vocabulary, (case.rows,))
    labels[torch.randperm(case.rows)[case.counted :]] = IGNORED
    grad = torch.ones((), device=device)
    return *head(case, dtype, device), labels.to(device), grad


def loss_functions(case: LossCase, device: str = "cpu") -> dict[str, Function]:
    def eager(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        logits = torch.tanh(logits / case.softcap) * case.softcap
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)

    def ours(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = ops.linear_cross_entropy(h, weight, labels, softcap=case.softcap)  # type: ignore[assignment]
        return loss

    libraries = gpu_baselines.cross_entropy(case.softcap, IGNORED) if device == "cuda" else {}
    if device == "cuda":
        libraries |= engines.compiled(eager)
    sides = {"eager": eager, **libraries, "fastvlm": ours}
    return {name: trained(side, (0, 1)) for name, side in sides.items()}


def topk_functions(case: TopkCase) -> dict[str, Function]:
    """Each gives the log-probabilities; of nearly equal ones the order may differ."""

    def eager(h: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(h, weight).float()
        logits = torch.tanh(logits / case.softcap) * case.softcap
        return logits.log_softmax(-1).topk(case.k).values

    def ours(h: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_topk(h, weight, case.k, softcap=case.softcap)[0]

    return {"eager": eager, "fastvlm": ours}


@each(LOSS)
def test_loss(
    run_case: Callable[..., None], case: LossCase, dtype: torch.dtype, device: str
) -> None:
    sides = loss_functions(case, device)
    run_case(
        case,
        dtype,
        lambda: loss_operands(case, dtype, device),
        sides,
        extra=lambda: (
            {"extra_memory_mib": memory.of_sides(case.name, sides)} if device == "cpu" else {}
        ),
    )


@each(TOPK)
def test_topk(
    run_case: Callable[..., None], case: TopkCase, dtype: torch.dtype, device: str
) -> None:
    run_case(case, dtype, lambda: head(case, dtype, device), topk_functions(case))
