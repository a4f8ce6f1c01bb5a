"""What the launchers decide by themselves: precision, families, what they refuse."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import emulator
import pytest
import torch

from fastvlm import ops, triton
from fastvlm.triton import configs
from fastvlm.triton.common import dot_precision
from fastvlm.triton.configs.spills import SPILLING, without_spills

F32, BF16 = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)


@pytest.fixture
def precisions() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, torch.backends.fp32_precision
    yield
    matmul.fp32_precision, torch.backends.fp32_precision = before


@pytest.mark.usefixtures("precisions")
def test_tf32_where_pytorch_may_by_either_of_its_settings() -> None:
    assert dot_precision(F32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert (dot_precision(F32), dot_precision(BF16)) == ("tf32", "ieee")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.fp32_precision = "tf32"
    assert dot_precision(F32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert dot_precision(F32) == "tf32"


def test_every_architecture_has_its_family() -> None:
    found = {c: configs.family_of(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))}
    assert list(found.values()) == ["sm80", "sm86", "sm86", "sm90", "sm100", "sm86"]
    assert configs.family_of((9, 4), hip=True) == "gfx9"


def test_a_gpu_that_is_too_old_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    triton._device_too_old.cache_clear()
    assert triton._device_too_old(0) == "compute capability 7.5 (8.0 or newer is needed)"
    triton._device_too_old.cache_clear()


@pytest.mark.triton
def test_products_are_the_librarys_where_triton_is_forced() -> None:
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with emulator.emulated() as session:
        assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))
        assert session.launches == 0


@pytest.mark.triton
def test_rows_of_width_0_have_gradients_too() -> None:
    leaves = [torch.randn(4, 0), torch.randn(4, 0), torch.randn(0), torch.randn(1)]
    leaves = [x.requires_grad_() for x in leaves]
    with emulator.emulated():
        h = ops.residual_rms_norm(*leaves[:3], gate=leaves[3])
        assert isinstance(h, torch.Tensor)
        h.sum().backward()
    assert leaves[3].grad is not None
    assert leaves[3].grad.item() == 0


def test_rows_that_would_spill_are_refused_with_the_reason() -> None:
    from fastvlm.triton import norm
    from tools.calls import shapes

    widest = {
        "rms_norm": shapes.WIDE_RMS,
        "residual_rms_norm": shapes.WIDE_RMS,
        "residual_layer_norm": shapes.WIDE_LAYER,
        "rms_norm_backward": shapes.WIDE_RMS_BACKWARD,
        "residual_rms_norm_backward": shapes.WIDE_RMS_BACKWARD,
        "residual_layer_norm_backward": shapes.WIDE_LAYER_BACKWARD,
    }
    assert set(widest) == set(norm.LAUNCHERS)
    for op, widths in widest.items():
        # the widest that is served is among those that are compiled
        n = widths[-1]
        assert norm.LAUNCHERS[op].unsupported(torch.empty(1, n)) is None
        why = norm.LAUNCHERS[op].unsupported(torch.empty(1, n + 1))
        assert why == f"rows of {n + 1} (it has up to {n})"


def test_the_best_config_that_fails_gives_way_to_the_first() -> None:
    good, bad = configs.Config({"BLOCK": 1}), configs.Config({"BLOCK": 2})
    ran = []

    def run(config: configs.Config) -> None:
        if config is bad:
            raise RuntimeError("too large")
        ran.append(config)

    configs._best["a kernel",] = bad
    configs._run_the_best([good, bad], run, ("a kernel",))
    assert ran == [good]
    assert configs._best.pop(("a kernel",)) is good


@pytest.mark.parametrize(
    ("version", "family"),
    [(version, family) for version in SPILLING for family in configs.FAMILIES],
)
def test_another_triton_chooses_no_config_that_spills_there(
    version: tuple[int, ...], family: str
) -> None:
    """Every config that is named is in the tables, each case has one left, and no other changes."""
    now = importlib.import_module(f"fastvlm.triton.configs.{family}")
    table = {**now.ATTENTION, **now.MLP, **now.LOSS}
    assert without_spills(family, table, (3, 8, 0)) == table
    assert without_spills(family, table, None) is table
    changed = without_spills(family, table, (*version, 1))
    named = SPILLING[version].get(family, {})
    assert {k for k in table if changed[k] != table[k]} == set(named)
    for kernel, spills in named.items():
        before, after = (
            [config for case in found[kernel] for config in case.configs]
            for found in (table, changed)
        )
        for spill in spills:
            every = spill.of is None
            gone = before.count(spill.config) if every else sum(s == spill for s in spills)
            assert gone
            assert after.count(spill.config) == before.count(spill.config) - gone
            assert all(new in after for new in spill.instead)
        assert all(case.configs for case in changed[kernel])


def test_one_case_alone_is_meant() -> None:
    """Heads above 128 are left without it, the others keep it."""
    now = importlib.import_module("fastvlm.triton.configs.sm90")
    (spill,) = SPILLING[3, 7]["sm90"]["cached_attention"]
    table = {**now.ATTENTION, **now.MLP, **now.LOSS}
    *_, wide, others = without_spills("sm90", table, (3, 7, 1))["cached_attention"]
    assert wide.when(size=2, d=256, rows=4)
    assert spill.config not in wide.configs
    assert spill.config in others.configs
