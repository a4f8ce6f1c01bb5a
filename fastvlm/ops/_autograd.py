"""What every op's public function does around its schema: autocast, gradients wanted, seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm.compat import pytorch


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; PyTorch does not answer for every type."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as matmuls get."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def autocast_wide(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors in float32 where autocast is on, as PyTorch's own layer_norm gets them."""
    if not autocasts(tensors[0].device.type):
        return tensors
    return tuple(t.float() if t.dtype != torch.float64 else t for t in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def seed_for(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed from the device's default generator: torch.manual_seed and checkpoints govern it."""
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)


def wanted(grads: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    """None in place of the empty tensors that stand for gradients nobody asked for."""
    return [g if need else None for g, need in zip(grads, needs)]


_TWICE = (
    "fastvlm: its ops have no second derivative (create_graph=True, a gradient penalty); take it "
    "of a model without fastvlm.patch, or after fastvlm.unpatch(model)"
)


def once_differentiable(backward: Callable[..., Any]) -> Any:
    """A backward pass whose gradients want none themselves: a RuntimeError says so where one is
    taken. PyTorch's decorator refuses only where the gradient that comes in wants one: that of a
    loss is 1, and wants none, and all behind it would pass for constants."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph=True
            return found
        refused = pytorch.refusing(_TWICE, found if isinstance(found, tuple) else (found,))
        return refused if isinstance(found, tuple) else refused[0]

    return run
