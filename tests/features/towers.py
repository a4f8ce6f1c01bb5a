"""Tiny models whose towers are frozen, and their steps."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor

Step = tuple[Tensor, dict[str, Tensor]]


def frozen(family: str = "florence2", projector: bool = False) -> Any:
    model: Any = models.FAMILIES[family].build()
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(not projector)
    return model.train()


def batch(model: Any, family: str = "florence2") -> dict[str, Any]:
    return dict(models.FAMILIES[family].training(model))


def step(model: Any, batch: dict[str, Any]) -> Step:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def same(one: Step, other: Step) -> bool:
    equal = torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    return equal and all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())


def refuse_to_run(model: Any) -> Any:
    """From here on nobody may run the tower's first convolution."""

    def fail(*_: Any) -> None:
        raise AssertionError("the tower ran")

    tower = model.model.vision_tower
    first = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))
    return first.register_forward_pre_hook(fail)
