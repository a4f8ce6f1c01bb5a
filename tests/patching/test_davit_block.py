"""Whole halves of DaViT blocks: what transformers computes, or left to it where a part is heard."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from error_rule import FORWARD, check
from torch import Tensor, nn
from transformers.models.florence2 import modeling_florence2 as florence2

import fastvlm
from fastvlm.patching import davit_block
from fastvlm.patching.patch import is_patched


def towers(compute: str | None = None) -> tuple[nn.Module, nn.Module]:
    """Transformers' tower and a patched copy of it."""
    model = models.florence2()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours, compute=compute)
    return model.model.vision_tower, ours.model.vision_tower


def features(tower: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = tower(x).last_hidden_state
    return out


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves that ran as one, by their attention."""
    ran: list[str] = []
    for half in (davit_block.SpatialHalf, davit_block.ChannelHalf):

        def attend(self: Any, *args: Any, was: Any = half._attend) -> Any:
            ran.append(self.attention)
            return was(self, *args)

        monkeypatch.setattr(half, "_attend", attend)
    return ran


HALVES = ["window_attn", "channel_attn"] * 4


@pytest.mark.parametrize("pixels", [(64, 64), (60, 44), (200, 36)], ids=str)
def test_the_tower_runs_in_halves(
    pixels: tuple[int, int], dtype: torch.dtype, fused: list[str]
) -> None:
    plain, ours = (tower.to(dtype) for tower in towers())
    x = torch.randn(2, 3, *pixels).to(dtype)
    with torch.no_grad():
        exact = features(copy.deepcopy(plain).double(), x.double())
        check("tower", features(ours, x), features(plain, x), exact, FORWARD)
    assert fused == HALVES


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(low: torch.dtype, fused: list[str]) -> None:
    plain, ours = towers()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = features(copy.deepcopy(plain).double(), x.double())
        with torch.autocast("cpu", low):
            check("tower", features(ours, x), features(plain, x), exact, FORWARD)
    assert fused == HALVES


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_frozen_tower_in_training(rate: float, fused: list[str]) -> None:
    """Stochastic depth draws what it would draw, and drops the same branches."""
    plain, ours = towers()
    for tower in (plain, ours):
        tower.train().requires_grad_(False)
        for half in list(tower.modules()):
            if is_patched(half) or hasattr(half, "drop_path1"):
                for part in ("drop_path1", "drop_path2"):
                    if hasattr(half, part):
                        setattr(half, part, florence2.Florence2DropPath(rate).train())
    x = torch.randn(5, 3, 60, 44)
    torch.manual_seed(3)
    expected, next_expected = features(plain, x), torch.rand(1)
    torch.manual_seed(3)
    got, next_got = features(ours, x), torch.rand(1)
    assert fused == HALVES
    assert torch.equal(next_got, next_expected)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not got.requires_grad


def test_an_unfrozen_tower_trains_on_its_parts(fused: list[str]) -> None:
    plain, ours = towers()
    x = torch.randn(1, 3, 60, 44)
    for tower in (plain, ours):
        features(tower, x).square().sum().backward()
    assert not fused
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "part", ["conv1", "norm2", "window_attn", "window_attn.qkv", "ffn", "ffn.fc2", "drop_path1"]
)
def test_a_part_that_is_listened_to_is_called(part: str, fused: list[str]) -> None:
    plain, ours = towers()
    half = ours.blocks[0][0].spatial_block
    heard: list[Tensor] = []
    half.get_submodule(part).register_forward_hook(lambda m, args, out: heard.append(out))
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad():
        torch.testing.assert_close(features(ours, x), features(plain, x), atol=1e-4, rtol=1e-4)
    assert heard
    assert fused == HALVES[1:]


def test_a_hook_that_changes_a_result_counts(fused: list[str]) -> None:
    plain, ours = towers()
    for tower in (plain, ours):
        attention = tower.blocks[1][0].channel_block.channel_attn
        attention.register_forward_hook(lambda m, args, out: out.sin())
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad():
        torch.testing.assert_close(features(ours, x), features(plain, x), atol=1e-4, rtol=1e-4)
    assert len(fused) == len(HALVES) - 1


def test_a_forced_reference_is_obeyed(fused: list[str]) -> None:
    plain, ours = towers()
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad(), fastvlm.use("reference"):
        torch.testing.assert_close(features(ours, x), features(plain, x), atol=1e-4, rtol=1e-4)
    assert not fused


def test_a_weight_that_changes_is_never_stale() -> None:
    plain, ours = towers()
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad():
        features(ours, x)
        for tower in (plain, ours):
            tower.blocks[2][0].channel_block.ffn.fc1.weight.mul_(0.5)
        torch.testing.assert_close(features(ours, x), features(plain, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", [nn.ReLU(), lambda x: x * 0.5], ids=["module", "lambda"])
def test_another_activation_since_is_called(act: Any, fused: list[str]) -> None:
    plain, ours = towers()
    for tower in (plain, ours):
        ffn = tower.blocks[1][0].spatial_block.ffn
        del ffn.activation_fn
        ffn.activation_fn = act
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = features(copy.deepcopy(plain).double(), x.double())
        check("tower", features(ours, x), features(plain, x), exact, FORWARD)
    assert len(fused) == len(HALVES) - 1


def test_a_norm_without_its_bias_since_is_called(fused: list[str]) -> None:
    plain, ours = towers()
    for tower in (plain, ours):
        tower.blocks[1][0].spatial_block.norm1.bias = None
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(features(ours, x), features(plain, x), atol=1e-4, rtol=1e-4)
    assert len(fused) == len(HALVES) - 1


def test_dtypes_that_do_not_go_together_are_torchs_error() -> None:
    plain, ours = towers()
    ours.blocks[0][0].spatial_block.ffn.fc1.bfloat16()
    plain.blocks[0][0].spatial_block.ffn.fc1.bfloat16()
    x = torch.randn(1, 3, 60, 44)
    for tower in (plain, ours):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="dtype"):
            features(tower, x)


def test_maps_of_any_strides_and_none_at_all() -> None:
    plain, ours = towers()
    x = torch.randn(2, 16, 7, 9).transpose(2, 3)
    with torch.no_grad():
        for name in ("spatial_block", "channel_block"):
            theirs, half = (getattr(tower.blocks[0][0], name) for tower in (plain, ours))
            torch.testing.assert_close(half(x), theirs(x), atol=1e-4, rtol=1e-4)
            out = half(x)
            assert out.permute(0, 2, 3, 1).is_contiguous()
            assert half(x[:0]).shape == (0, 16, 9, 7)


def test_what_a_half_keeps_and_why() -> None:
    model = models.florence2()
    tower = model.model.vision_tower
    tower.blocks[0][0].spatial_block.norm1 = nn.RMSNorm(16)
    tower.blocks[0][0].channel_block.drop_path2 = nn.Dropout(0.1)
    tower.blocks[1][0].spatial_block.ffn.activation_fn = nn.Tanh()
    tower.blocks[1][0].channel_block.gate = nn.Parameter(torch.ones(1))
    tower.blocks[2][0].spatial_block.conv1 = nn.Conv2d(32, 32, 5, padding=2, groups=32)
    report = fastvlm.patch(model)
    entries = {e.module.removeprefix("model.vision_tower.blocks."): e for e in report.entries}
    assert {name: e.reason for name, e in entries.items() if name.endswith("_block")} == {
        "0.0.spatial_block": "its norms are not LayerNorm over the channels",
        "0.0.channel_block": "Dropout is not known as stochastic depth",
        "1.0.spatial_block": "its MLP is not fc2(activation(fc1 x))",
        "1.0.channel_block": "it has parts of its own: gate",
        "2.0.spatial_block": "its convolutions are not 3 x 3 of each channel",
        "2.0.channel_block": None,
        "3.0.spatial_block": None,
        "3.0.channel_block": None,
    }
    assert entries["2.0.channel_block"].ops == (
        "depthwise_conv_norm",
        "channel_attention",
        "residual_linear",
        "residual_gelu_mlp",
    )


def test_unpatched_again_is_transformers() -> None:
    model = models.florence2()
    tower = model.model.vision_tower
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad():
        before = features(tower, x)
        fastvlm.patch(model)
        fastvlm.unpatch(model)
        assert torch.equal(features(tower, x), before)
    assert not any(is_patched(module) for module in model.modules())


@pytest.mark.parametrize("compute", [None, "int8", "bf16"])
def test_a_half_compiles_without_a_break(compute: str | None) -> None:
    torch._dynamo.reset()
    plain, ours = towers(compute)
    for name in ("spatial_block", "channel_block"):
        theirs, half = (getattr(tower.blocks[0][0], name) for tower in (plain, ours))
        compiled = torch.compile(half, fullgraph=True, backend="eager")
        x = torch.randn(1, 16, 7, 9)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), theirs(x), atol=1e-4, rtol=1e-4)
