"""Whether a patched model computes what it computed before."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def numbers(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients one after the other."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads)


def assert_the_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.allclose(got[0], want[0], rtol=1e-5), (got[0], want[0])
    assert torch.allclose(got[1], want[1], atol=2e-4 * want[1].abs().max().item())
