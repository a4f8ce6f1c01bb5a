"""The convolutions of a vision tower: their layout, and bfloat16 arithmetic."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKWARD, FORWARD, check
from torch import Tensor, nn

import fastvlm
from fastvlm.nn import compute as narrow
from fastvlm.nn import low_precision
from fastvlm.nn.linear import Conv2d

# channels in and out, size of the kernel, stride, padding
KINDS = [(3, 16, 7, 4, 3), (16, 24, 3, 2, 1), (8, 5, (3, 2), (1, 2), 0), (4, 6, 1, 1, 0)]


def layers(kind: tuple[int, ...], bias: bool = True) -> tuple[nn.Conv2d, Conv2d]:
    inputs, outputs, *rest = kind
    plain = nn.Conv2d(inputs, outputs, *rest, bias=bias)
    ours = copy.deepcopy(plain)
    ours.__class__ = Conv2d
    return plain, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_in_another_layout(kind: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, ours = layers(kind)
    x = torch.randn(2, kind[0], 19, 23)
    results: list[list[Tensor]] = []
    for layer, to in ((plain, dtype), (ours, dtype), (plain, torch.float64)):
        layer = copy.deepcopy(layer).to(dtype).to(to)
        input = x.to(dtype).to(to).requires_grad_()
        out = layer(input)
        grads = torch.autograd.grad(out.square().sum(), (input, layer.weight))
        results.append([out.detach(), *grads])
    for name, torchs, found, exact in zip(("y", "dx", "dw"), *results):
        check(name, found, torchs, exact, FORWARD if name == "y" else BACKWARD)


def test_channels_lie_together_behind_it() -> None:
    """Of a picture too, whose channels come one after the other: a norm need not copy its map."""
    plain, ours = layers(KINDS[0])
    x = torch.randn(1, 3, 32, 32)
    assert ours(x).permute(0, 2, 3, 1).is_contiguous()
    assert not plain(x).permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("images", [1, 2])
def test_convolutions_leave_channels_together(images: int) -> None:
    """A map of one image, whose strides do not say how it lies, comes out as it came in."""
    model = models.florence2()
    tower = model.model.vision_tower
    together: list[bool] = []
    kinds = {
        name: module
        for name, module in tower.blocks.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    for module in kinds.values():
        module.register_forward_hook(lambda m, args, out: together.append(out.stride(1) == 1))
    with torch.no_grad():
        tower(torch.randn(images, 3, 64, 64))
        before, together[:] = [*together], []
        report = fastvlm.patch(model)
        tower(torch.randn(images, 3, 64, 64))
    assert len(together) == len(kinds) > 0
    assert all(together)
    assert all(before) == (images > 1)
    ops = {entry.module: entry.ops for entry in report.entries}
    assert all(ops[f"model.vision_tower.blocks.{name}"] == ("depthwise_conv",) for name in kinds)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions can be bfloat16 here, also of a map of few rows."""
    monkeypatch.setattr(narrow, "FEWEST_ROWS", 1)
    monkeypatch.setattr(narrow, "unavailable", lambda compute: None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_operands_are_rounded_and_nothing_else(
    kind: tuple[int, ...], bias: bool, rounding: None
) -> None:
    plain, ours = layers(kind, bias)
    ours.__class__ = narrow.ComputeConv2d
    x = torch.randn(2, kind[0], 19, 23)
    with torch.no_grad():
        found = ours(x)
        assert found.dtype == torch.float32
        rounded = (t.bfloat16().double() for t in (x, plain.weight))
        shift = None if plain.bias is None else plain.bias.double()
        exact = F.conv2d(*rounded, shift, plain.stride, plain.padding)
        product = exact if shift is None else exact - shift[:, None, None]
        # the sums are rounded once, before the bias
        assert ((found - exact).abs() <= 2**-8 * product.abs() + 1e-6).all()
        assert not torch.equal(found, plain(x))
        plain.weight += 1
        ours.weight += 1  # a copy is never stale
        assert (ours(x) - plain(x)).abs().max() < 0.05 * plain(x).abs().max()
    usual = copy.deepcopy(ours)
    usual.__class__ = Conv2d
    x.requires_grad_()
    assert torch.equal(ours(x), usual(x))


def test_a_map_of_other_channels_is_refused_as_pytorch_does(rounding: None) -> None:
    _, ours = layers(KINDS[1])
    ours.__class__ = narrow.ComputeConv2d
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected input"):
        ours(torch.randn(1, 7, 9, 9))


@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_the_tower_has_them_and_gives_them_back(compute: str, rounding: None) -> None:
    model = models.florence2()
    tower = model.model.vision_tower
    x = torch.randn(1, 3, 64, 64)
    kinds = {name: type(module) for name, module in model.named_modules()}

    def features() -> Tensor:
        with torch.no_grad():
            found: Tensor = tower(x).last_hidden_state
        return found

    plain = features()
    report = fastvlm.patch(model)
    assert [e.ops for e in report.entries if e.kind == "Conv2d" and ".convs." in e.module] == (
        [("conv2d",)] * len(tower.convs)
    )
    ours = features()
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    notes = fastvlm.patch(model, compute=compute).notes
    assert notes[0].endswith("; convolutions of the vision tower are in bfloat16")
    assert not torch.equal(features(), ours)
    assert all(embed.conv in low_precision._copies for embed in tower.convs)
    fastvlm.unpatch(model)
    assert torch.equal(features(), plain)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any(embed.conv in low_precision._copies for embed in tower.convs)


def test_a_class_of_somebodys_own_stays() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = models.florence2()
    conv = model.model.vision_tower.convs[1].conv
    conv.__class__ = Own
    fastvlm.patch(model)
    assert type(conv) is Own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_16_bits_keeps_its_dtype(bias: bool, dtype: torch.dtype, rounding: None) -> None:
    _, ours = layers(KINDS[1], bias)
    plain = copy.deepcopy(ours.to(dtype))  # in the same layout
    ours.__class__ = narrow.ComputeConv2d
    x = torch.randn(2, 16, 9, 9, dtype=dtype)
    with torch.no_grad():
        found, usual = ours(x), plain(x)
    assert found.dtype == dtype
    # one of bfloat16 is computed as it always is
    assert torch.equal(found, usual) == (dtype == torch.bfloat16)
    assert (found - usual).abs().max() < 0.02 * usual.abs().max()


def test_compilers_and_transforms_meet_what_they_know(rounding: None) -> None:
    plain, ours = layers(KINDS[1])
    rounds = copy.deepcopy(plain)
    rounds.__class__ = narrow.ComputeConv2d
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        usual = plain(x)
        for layer in (ours, rounds):
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), usual)
            mapped = torch.func.vmap(lambda one, layer=layer: layer(one[None])[0])(x)
            torch.testing.assert_close(mapped, usual)
    torch.testing.assert_close(ours(x.to_mkldnn()).to_dense(), usual)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(x), usual)
