"""Whole models on a GPU: tokens in float32, patched and not, and losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES
from test_families import generate, gradients, in_dtype
from torch import Tensor, nn

import fastvlm

pytestmark = pytest.mark.gpu
FAMILY = pytest.mark.parametrize("name", list(FAMILIES))


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """TF32 would round tokens apart."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


@FAMILY
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_tokens(name: str, beams: int) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = on_gpu(family.inputs(model))
    model.cuda()
    expected = generate(model, inputs, num_beams=beams)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_and_gradients_meet_the_error_rule(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model = family.build()
    batch = family.training(model)
    with fastvlm.patched(oracle := family.build().double().train()), fastvlm.use("reference"):
        exact = gradients(oracle, in_dtype(batch, torch.float64))
        exact["loss"] = loss_of(oracle, in_dtype(batch, torch.float64))
    model.to(dtype).train().cuda()
    batch = on_gpu(in_dtype(batch, dtype))
    plain = {**gradients(model, batch), "loss": loss_of(model, batch)}
    fastvlm.patch(model)
    ours = {**gradients(model, batch), "loss": loss_of(model, batch)}
    assert ours.keys() == plain.keys()
    # the loss is one number, and PyTorch's may be right by luck: its own rounding is allowed for
    for part, value in ours.items():
        tiny = 2 * torch.finfo(dtype).eps * exact[part].abs().max()
        allowed = (plain[part].cpu().double() - exact[part]).abs().max()
        assert (value.cpu().double() - exact[part]).abs().max() <= 3 * allowed + tiny, part


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).loss.detach()
