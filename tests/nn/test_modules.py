"""The modules for a model of one's own, against plain PyTorch: values, gradients, state, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from error_rule import BACKWARD, FORWARD, check
from torch import Tensor
from torch.nn import Linear, Module, functional

import fastvlm
from fastvlm import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q_LENGTHS, KV_LENGTHS, IMAGE_OF = [3, 1, 5], [7, 2], [0, 1, 0]
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 16

Formula = Callable[..., Tensor]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM))


def _project(module: Any, name: str, x: Tensor) -> Tensor:
    layer = getattr(module, name)
    return _heads(functional.linear(x, layer.weight, layer.bias))


def _cross(module: Any, x: Tensor, images: Tensor) -> Tensor:
    q = _project(module, "q_proj", x)
    k, v = _project(module, "k_proj", images), _project(module, "v_proj", images)
    out = plain.attention(
        q, k, v, Q_LENGTHS, KV_LENGTHS, IMAGE_OF, scale=module.scale, softcap=module.softcap
    )
    return functional.linear(out.flatten(1), module.out_proj.weight, module.out_proj.bias)


def _self(module: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k = plain.rope(_project(module, "q_proj", x), _project(module, "k_proj", x), cos, sin)
    own = list(range(len(Q_LENGTHS)))
    out = plain.attention(
        q,
        k,
        _project(module, "v_proj", x),
        Q_LENGTHS,
        Q_LENGTHS,
        own,
        causal=module.causal,
        window=module.window,
        softcap=module.softcap,
    )
    return functional.linear(out.flatten(1), module.out_proj.weight, module.out_proj.bias)


def _gelu(module: Any, x: Tensor) -> Tensor:
    fc1, fc2 = module.fc1, module.fc2
    return plain.gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, module.approximate)


def _layout(cross: bool) -> fastvlm.Layout:
    if cross:
        return fastvlm.Layout.from_lengths(Q_LENGTHS, KV_LENGTHS, IMAGE_OF)
    return fastvlm.Layout.from_lengths(Q_LENGTHS)


def _case(name: str) -> tuple[Module, Formula, list[Tensor], tuple[Any, ...]]:
    """A module, its formula, its tensors in float64, and what it takes besides."""
    rows, keys = sum(Q_LENGTHS), sum(KV_LENGTHS)
    x = torch.randn(rows, WIDTH, dtype=torch.float64)
    kinds: dict[str, Any] = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    if name == "cross":
        module: Module = nn.CrossAttention(
            WIDTH, HEADS, kv_size=20, scale=0.3, softcap=5.0, **kinds
        )
        return module, _cross, [x, torch.randn(keys, 20, dtype=x.dtype)], (_layout(True),)
    if name == "self":
        module = nn.SelfAttention(WIDTH, HEADS, window=3, bias=False, **kinds)
        angles = torch.randn(rows, HEAD_DIM // 2, dtype=x.dtype).repeat(1, 2)
        return module, _self, [x, angles.cos(), angles.sin()], (_layout(False),)
    approximate = name.partition("-")[2]
    return nn.GeluMLP(WIDTH, 40, approximate), _gelu, [x], ()


def _ours(module: Module, tensors: list[Tensor], others: tuple[Any, ...]) -> Tensor:
    if isinstance(module, nn.SelfAttention):
        x, cos, sin = tensors
        return module(x, *others, rotary=(cos, sin))  # type: ignore[no-any-return]
    return module(*tensors, *others)  # type: ignore[no-any-return]


def _gradients(result: Tensor, wanted: list[Tensor], towards: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, wanted, towards.to(result.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cross", "self", "gelu-none", "gelu-tanh"])
def test_a_module_is_its_formula(name: str, dtype: torch.dtype) -> None:
    module, formula, tensors, others = _case(name)
    module.to(dtype)
    differentiated = 2 if name == "cross" else 1  # cos and sin are constants of ops.rope
    inputs = [t.to(dtype).requires_grad_(i < differentiated) for i, t in enumerate(tensors)]
    exact_module, _, _, _ = _case(name)
    exact_module.double().load_state_dict(module.state_dict())
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = formula(exact_module, *exact_inputs)
    torchs, ours = formula(module, *inputs), _ours(module, inputs, others)
    check(name, ours, torchs, exact, FORWARD)

    towards = torch.randn_like(exact)
    wanted = [*inputs[:differentiated], *module.parameters()]
    exactly = [*exact_inputs[:differentiated], *exact_module.parameters()]
    names = [*map(str, range(differentiated)), *(n for n, _ in module.named_parameters())]
    found = zip(
        names,
        _gradients(ours, wanted, towards),
        _gradients(torchs, wanted, towards),
        _gradients(exact, exactly, towards),
    )
    for part, *gradients in found:
        check(f"gradient of {part}", *gradients, BACKWARD)


def test_dropout_is_of_training_alone() -> None:
    cross = nn.CrossAttention(WIDTH, HEADS, dropout_p=0.5)
    own = nn.SelfAttention(WIDTH, HEADS, dropout_p=0.5)
    mlp = nn.GeluMLP(WIDTH, 40, activation_dropout=0.5)
    x = torch.randn(sum(Q_LENGTHS), WIDTH)
    images = torch.randn(sum(KV_LENGTHS), WIDTH)
    calls = [
        (cross, (x, images, _layout(True))),
        (own, (x, _layout(False))),
        (mlp, (x,)),
    ]
    for module, arguments in calls:
        assert not torch.equal(module(*arguments), module(*arguments))
        module.eval()
        assert torch.equal(module(*arguments), module(*arguments))


def test_state_has_the_names_of_transformers() -> None:
    attention = {f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    for module in (nn.CrossAttention(WIDTH, HEADS), nn.SelfAttention(WIDTH, HEADS)):
        assert set(module.state_dict()) == attention
        assert isinstance(module.q_proj, Linear)
    names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert set(nn.GeluMLP(WIDTH, 40).state_dict()) == names


@pytest.mark.parametrize("kind", [nn.CrossAttention, nn.SelfAttention])
def test_heads_that_do_not_divide_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: num_kv_heads must divide .*; got 3"):
        kind(WIDTH, HEADS, num_kv_heads=3)
