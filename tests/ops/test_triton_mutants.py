"""Planted bugs in the Triton kernels, each of which must be caught by the checks that pass without.

A mutant is a kernel file with one line changed. It is caught where a result breaks the error rule
or the emulator reports an access outside of a tensor or a race; test_triton_kinds.py plants some of
which it is known what they must be caught as.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulator
import plain
import pytest
import torch

pytest.importorskip("triton")
from test_skipped_gradients import check_bound, head
from test_triton_attention import CROSS, OWN, SEED, cross, dropped, leaves, own
from test_triton_skipping import poisoned
from test_triton_skipping import small as small_tiles

from fastvlm import ops
from fastvlm.ops import attention as public
from fastvlm.triton import loss

pytestmark = pytest.mark.triton
Rule = Callable[..., None]


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_(grad)


def check_cross(rule: Rule) -> None:
    rule(
        lambda *x: cross(*x, softcap=5.0, scale=0.3),
        lambda *x: plain.attention(*x, *CROSS, softcap=5.0, scale=0.3),
        leaves(randn, CROSS, (4, 2), 40),
    )


def check_window(rule: Rule) -> None:
    # 18: row 32, the first of a block of rows, sees key 15, the last of a block of keys
    for settings in ({"causal": True, "window": 18}, {"causal": False, "window": 7}):
        rule(
            lambda *x, s=settings: own(*x, **s),
            lambda *x, s=settings: plain.attention(*x, *OWN, **s),
            leaves(randn, OWN, (1, 1), 16),
        )


def check_causal(rule: Rule) -> None:
    rule(
        lambda *x: own(*x),
        lambda *x: plain.attention(*x, *OWN, causal=True),
        leaves(randn, OWN, (2, 1), 16),
    )


def check_dropout(rule: Rule) -> None:
    before, public.seed_for = public.seed_for, lambda q, p: SEED
    try:
        rule(
            lambda *x: cross(*x, softcap=5.0, dropout_p=0.3),
            lambda *x: dropped(*x, CROSS, 0.3, 5.0, False, 0),
            leaves(randn, CROSS, (2, 1), 16),
        )
    finally:
        public.seed_for = before


def check_splits(rule: Rule) -> None:
    lengths = ([1, 1, 1, 2], [300, 140], [0, 0, 0, 1])
    layout = public.Layout.from_lengths(*lengths)
    rule(
        lambda *x: ops.cross_attention(*x, layout),
        lambda *x: plain.attention(*x, *lengths),
        [x.detach() for x in leaves(randn, lengths, (2, 1), 16)],
    )


def check_cached(rule: Rule) -> None:
    rows, time, filled = 3, 150, [150, 0, 131]
    table = torch.where(torch.rand(rows, time) < 0.1, -1, torch.randint(0, 4, (rows, time))).int()
    inputs = [randn(rows, 2, 16), randn(4, time, 1, 16), randn(4, time, 1, 16)]
    for window in (None, 9):
        settings = {"window": window, "softcap": 5.0}
        rule(
            lambda *x, s=settings: ops.cached_attention(
                *x, torch.tensor(filled), ancestry=table, **s
            ),
            lambda *x, s=settings: plain.cached_attention(*x, filled, table, **s),
            inputs,
        )


def check_rms(rule: Rule) -> None:
    n = 50
    shapes = [(130, n), (130, n), (n,), (1,), (n,)]
    rule(
        lambda x, r, w, g, y: ops.residual_rms_norm(x, r, w, gate=g, next_weight=y),
        plain.residual_rms_norm,
        [randn(*s, grad=True) for s in shapes],
    )


def check_layer(rule: Rule) -> None:
    shapes = [(130, 50), (130, 50), (50,), (50,)]
    rule(
        ops.residual_layer_norm,
        plain.residual_layer_norm,
        [randn(*s, grad=True) for s in shapes],
    )


def check_rope(rule: Rule) -> None:
    angle = torch.randn(5, 24).repeat(1, 2)
    rule(
        lambda q, k: ops.rope(q, k, angle.cos().to(q.dtype), angle.sin().to(q.dtype)),
        lambda q, k: plain.rope(q, k, angle.cos().to(q.dtype), angle.sin().to(q.dtype)),
        [randn(5, 3, 48, grad=True), randn(5, 2, 48, grad=True)],
    )


# rows, width, hidden width: ragged, and of several tiles of 16
TILED = (37, 35, 33)


def check_geglu(rule: Rule) -> None:
    m, k, f = TILED
    shapes = [(m, k), (f, k), (f, k), (21, f)]
    rule(
        ops.geglu_mlp,
        lambda *x: plain.geglu_mlp(*x, "tanh"),
        [randn(*s, grad=True) for s in shapes],
    )


def check_gelu(rule: Rule) -> None:
    m, k, f = TILED
    shapes = [(m, k), (f, k), (f,), (21, f), (21,)]
    rule(
        ops.gelu_mlp, lambda *x: plain.gelu_mlp(*x, "none"), [randn(*s, grad=True) for s in shapes]
    )


def check_stored(rule: Rule) -> None:
    m, k, n = TILED
    weight, scale = ops.quantize_rows(torch.randn(n, k))
    rule(
        lambda x, b: ops.low_precision_linear(x, weight, scale, b),
        lambda x, b: x @ (weight.to(x.dtype) * scale.to(x.dtype)[:, None]).t() + b,
        [randn(m, k), randn(n)],
    )


def check_loss(rule: Rule, dtype: torch.dtype = torch.float32) -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    labels = torch.randint(0, 100, (37,)).masked_fill(torch.rand(37) < 0.3, -100)
    before = loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS
    loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS = 0, 32, 32
    try:
        rule(
            lambda h, w, b: ops.linear_cross_entropy(h, w, labels, bias=b, softcap=3.0),
            lambda h, w, b: plain.linear_cross_entropy(h, w, labels, bias=b, softcap=3.0),
            [leaf(37, 23), leaf(100, 23), leaf(100)],
        )
    finally:
        loss.SCRATCH_BYTES, loss.FEWEST_COLUMNS, loss.COLUMNS = before


def check_loss_of_16_bits(rule: Rule) -> None:
    """Its cap and its slope are computed in other terms than those of float32."""
    check_loss(rule, torch.float16)


def _scaled(*shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
    return (torch.randn(*shape) * scale).requires_grad_(grad)


def check_skipping(rule: Rule) -> None:
    """What is left out is bounded, tiles are skipped, and no sum reads those that are."""
    # a tile has one number that counts, if any
    h, weight, labels = head("peaked", _scaled)
    for geometry in ("sums-are-coarser", "halves"):
        with small_tiles(geometry):
            check_bound(ops.linear_cross_entropy, h, weight, labels, 0.05)  # type: ignore[arg-type]
    labels = (h @ weight.t()).argmax(1)  # sure of it, so that its own gradient is tiny, too
    with small_tiles(), poisoned() as dead:
        out = ops.linear_cross_entropy(h, weight, labels, skip_tiny_gradients=0.2)
        found = torch.autograd.grad(out, (h, weight))  # type: ignore[arg-type]
    assert all(x.isfinite().all() for x in found)
    tiles = torch.cat(dead, 1)
    assert tiles.float().mean() > 0.3
    assert not tiles[torch.arange(h.shape[0]) // 16, labels // 16].any()


def check_topk(rule: Rule) -> None:
    def plainly(h: torch.Tensor, w: torch.Tensor) -> Any:
        found = torch.log_softmax(h @ w.t(), -1).topk(5)
        return found.values.to(h.dtype if h.dtype == torch.float64 else torch.float32)

    weight = randn(60, 23)
    weight[50] = weight[3]  # equal scores: the smaller index comes first
    h = randn(37, 23)
    with torch.no_grad():
        _, indices, _ = ops.linear_topk(h, weight, 60)
        assert ((indices == 3).int().argmax(1) < (indices == 50).int().argmax(1)).all()
        assert (indices.sort(1).values == torch.arange(60)).all()
        rule(lambda *x: ops.linear_topk(*x, 5)[0], plainly, [h, weight])


@dataclass(frozen=True)
class Mutant:
    """old is one place of a kernel file; the launcher knows that file by the name `seen_as`."""

    name: str
    check: Callable[[Rule], None]
    launcher: str
    seen_as: str
    old: str
    new: str


def _of(
    launcher: str, seen_as: str, *mutants: tuple[str, Callable[[Rule], None], str, str]
) -> list[Mutant]:
    return [Mutant(name, check, launcher, seen_as, *change) for name, check, *change in mutants]


MUTANTS = [
    *_of(
        "attention", "forward",
        ("no-rescale", check_cross, "acc = acc * rescale[:, None]", "acc = acc * 1.0"),
        ("sum-not-rescaled", check_cross, "total = total * rescale +", "total = total +"),
        ("tail-not-masked", check_cross, "seen = key < keys", "seen = key < keys + 1"),
        ("order-ignored", check_cross, "row = tl.load(ORDER + row, mask=real, other=0)", "pass"),
        ("one-head-of-a-group", check_cross, "return real, place, row, m % GROUP",
         "return real, place, row, m % 1"),
        ("reads-outside", check_cross, "return tl.load(at, mask=real[:, None] & (d < D)[None, :], "
         "other=0.0)", "return tl.load(at)"),
        ("writes-outside", check_cross,
         "tl.store(at, value, mask=real[:, None] & (d < D)[None, :])", "tl.store(at, value)"),
        ("no-cap", check_cross, "s = outer * tanh(s * inner, ACCURATE)", "s = outer * s * inner"),
        ("causal-off-by-one", check_causal, "key <= place", "key < place"),
        ("causal-block-not-masked", check_causal,
         "clear = tl.minimum(clear, (earliest + 1) // BLOCK_N * BLOCK_N)", "pass"),
        ("window-off-by-one", check_window, "place - key < window", "place - key <= window"),
        ("window-starts-late", check_window, "earliest - window + 1, 0",
         "earliest - window + 17, 0"),
        ("other-dropout", check_dropout, "(row_head[:, None] << 32)",
         "(row_head[:, None] << 31)"),
        ("dropout-not-scaled", check_dropout, "p * factor, 0.0", "p, 0.0"),
        ("splits-overlap", check_splits, "hi = tl.minimum(lo + share, keys)", "hi = keys"),
        ("parts-not-weighed", check_splits, "sums * tl.exp2(part - base)", "sums"),
        ("splits-in-one-place", check_splits,
         "row_head += split.to(tl.int64) * rows * heads", "row_head += 0"),
    ),
    *_of(
        "attention", "backward",
        ("no-delta", check_cross, "p * (dp - delta)", "p * dp"),
        ("no-slope", check_cross, "ds = ds * (1.0 - t * t)", "ds = ds"),
        ("dq-not-scaled", check_cross, "dq * scale", "dq"),
        ("dk-not-scaled", check_cross, "dk * scale", "dk"),
        ("dk-in-one-head", check_cross, "to = at * kv_heads + head", "to = at * kv_heads"),
        ("readers-end-early", check_cross, "hi * GROUP, BLOCK_M",
         "hi * GROUP - BLOCK_M, BLOCK_M"),
        ("not-normalized", check_cross, "1.0 / tl.where(none, 1.0, total)", "1.0"),
        ("causal-keys-skip-rows", check_causal, "lo = tl.minimum(block * BLOCK_N, readers)",
         "lo = tl.minimum(block * BLOCK_N + 1, readers)"),
        ("window-keys-skip-rows", check_window, "block * BLOCK_N + BLOCK_N - 1 + window",
         "block * BLOCK_N + BLOCK_N - 2 + window"),
        ("mask-of-dp-forgotten", check_dropout, "dp = tl.where(dropped, 0.0, dp * factor)",
         "dp = dp * factor"),
        ("mask-inverted", check_dropout, "met = tl.where(dropped, 0.0, p * factor)",
         "met = tl.where(dropped, p * factor, 0.0)"),
    ),
    *_of(
        "attention", "cached",
        ("ancestry-of-its-own-row", check_cached, "mask=seen, other=-1).to(tl.int64)",
         "mask=seen, other=-1).to(tl.int64) * 0 + r"),
        ("sees-padding", check_cached, "seen = seen & (n >= 0)", "n = tl.maximum(n, 0)"),
        ("window-off-by-one", check_cached, "length - window, 0", "length - window - 1, 0"),
        ("split-loses-keys", check_cached, "lo = tl.minimum(lo + split * share, hi)",
         "lo = tl.minimum(lo + split * share + split, hi)"),
    ),
    *_of(
        "norm", "kernels",
        ("mean-over-the-block", check_rms, "tl.rsqrt(tl.sum(x * x, 0) / n + eps)",
         "tl.rsqrt(tl.sum(x * x, 0) / x.shape[0] + eps)"),
        ("gate-of-the-raw-number", check_rms, "gate = _tanh_of_one(raw)", "gate = raw"),
        ("no-projection", check_rms, "rstd * (scaled - normed * (along / n))", "rstd * scaled"),
        ("parts-race", check_rms, "_put(DWEIGHT, part, n, columns, mask, dweight * gate)",
         "_put(DWEIGHT, part // 2, n, columns, mask, dweight * gate)"),
        ("last-row-lost", check_rms, "part * rows + rows, m)", "part * rows + rows, m - 1)"),
        ("mean-of-padding", check_layer, "centred = tl.where(mask, z - tl.sum(z, 0) / n, 0.0)",
         "centred = z - tl.sum(z, 0) / n"),
        ("bias-forgotten", check_layer, " + _vector(BIAS, columns, mask)", ""),
    ),
    *_of(
        "mlp", "kernels",
        ("up-not-multiplied", check_geglu, "gelu(gates[i], TANH) * ups[i]", "gelu(gates[i], TANH)"),
        ("no-tail-of-k", check_geglu, "k - done, 1, BLOCK_K, EVEN_K)",
         "BLOCK_K, 1, BLOCK_K, EVEN_K)"),
        ("gradients-swapped", check_geglu, "dhiddens[i] * up * slope", "dhiddens[i] * act * slope"),
        ("slope-of-the-activation", check_gelu, "dpre = dhiddens[i] * slope",
         "dpre = dhiddens[i] * act"),
        ("bias-of-another-column", check_gelu, "tl.load(BIAS + column, mask=column < f, other=0.0)",
         "tl.load(BIAS + column - column % 2, mask=column < f, other=0.0)"),
        ("sums-of-rows-that-are-not", check_gelu, "tl.sum(tl.where(mask, dpre, 0.0), 0)",
         "tl.sum(dpre, 0) + 1.0"),
        ("blocks-of-rows-race", check_gelu, "DBIAS + block_m.to(tl.int64) * f + column",
         "DBIAS + column"),
        ("scale-forgotten", check_stored, "if HAS_SCALE:", "if HAS_SCALE and BLOCK_K < 0:"),
        ("one-term", check_stored, "rest = tl.where(rest == term, 0.0, rest - term)",
         "rest = rest * 0.0"),
    ),
    *_of(
        "loss", "kernels",
        ("label-of-the-next", check_loss, "label[:, None] == column[None, :], logits, 0.0",
         "label[:, None] + 1 == column[None, :], logits, 0.0"),
        ("order-with-a-hole", check_loss, "before - 1, rows - 1 - (row - before)",
         "before - 1, rows - 1"),
        ("beyond-the-vocabulary", check_loss, 'tl.where(inside[None, :], logits, float("-inf"))',
         "logits"),
        ("no-bias", check_loss, "if HAS_BIAS:", "if HAS_BIAS and not HAS_BIAS:"),
        ("cap-from-zero", check_loss_of_16_bits, "cap - 2.0 * cap * below_cap",
         "0.0 - 2.0 * cap * below_cap"),
        ("best-found-twice", check_topk, "keys = tl.where(keys == best[:, None], _NONE, keys)",
         "keys = keys"),
        ("ties-the-other-way", check_topk, "(_LAST - column).to(tl.int64)", "column.to(tl.int64)"),
        ("blocks-exhausted", check_topk, "inside & (taken < kept)", "inside"),
    ),
    *_of(
        "loss", "backward",
        ("no-one-hot", check_loss, "p - 1.0, p", "p, p"),
        ("no-slope", check_loss, "dlogits *= 1.0 - t * t", "dlogits *= 1.0"),
        ("half-a-slope", check_loss_of_16_bits, "4.0 * grad", "2.0 * grad"),
        ("bias-beside-it", check_loss, "logits += bias.to(tl.float32)[None, :]", "logits += 0.0"),
        ("padding-learns", check_loss, "mask=token[:, None] & feature[None, :]",
         "mask=(token | True)[:, None] & feature[None, :]"),
        ("first-chunk-alone", check_loss, "mask=counts & (first == 0)",
         "mask=counts & (first > 1)"),
        ("ignored-rows-learn", check_loss, "tl.where(counts, total * scale, 0.0)",
         "total * scale + tl.where(counts, 0.0, 1.0)"),
        ("rows-not-masked", check_loss, "mask=inside[None, :], other=0.0)",
         "mask=(inner >= 0)[None, :], other=0.0)"),
        ("label-skipped", check_skipping, "tiny & (own == 0)", "tiny"),
        ("more-is-tiny", check_skipping, "(skip_below * tl.abs(grad))",
         "(8.0 * skip_below * tl.abs(grad))"),
        ("nothing-is-tiny", check_skipping, "tl.where(tiny & (own == 0), 0, 1)", "1 + 0 * own"),
        ("half-a-tile-judged", check_skipping, "live |= _put_dlogits", "live = _put_dlogits"),
        ("step-twice", check_skipping, "step = tl.load(STEPS + tl.minimum(i, steps - 1))",
         "step = tl.load(STEPS + tl.minimum(i - 1, steps - 1))"),
        ("list-of-another-block", check_skipping, "STEPS += block_m * tl.cdiv(count, BLOCK_K)",
         "STEPS += 0"),
        ("steps-not-in-order-of-tiles", check_skipping, "stride, inner_stride = 1, across",
         "stride, inner_stride = across, 1"),
        ("one-tile-of-a-step", check_skipping, "tl.minimum(block * BLOCK + BLOCK, end)",
         "tl.minimum(block * BLOCK + 1, end)"),
        ("unit-forgotten", check_loss, "total_of_token = tl.sum(total, 0) * tl.load(SCALE)",
         "total_of_token = tl.sum(total, 0)"),
    ),
    *_of(
        "rope", "kernels",
        ("turns-the-wrong-way", check_rope, "first * cos1 - second * sin1",
         "first * cos1 + second * sin1"),
        ("back-is-forward", check_rope, "if BACK:", "if not BACK:"),
        ("heads-not-masked", check_rope, "if head < count:", "if head <= count:"),
    ),
]  # fmt: skip
CHECKS = {m.check.__name__: m.check for m in MUTANTS}


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulator.emulated():
        yield


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_kernels_pass(name: str, follows_the_error_rule: Rule) -> None:
    CHECKS[name](follows_the_error_rule)


_numbers = itertools.count()


def planted(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on the launcher has the kernel file with the bug."""
    launcher = importlib.import_module(f"fastvlm.triton.{mutant.launcher}")
    source = Path(getattr(launcher, mutant.seen_as).__file__).read_text()
    assert source.count(mutant.old) >= 1, "the kernel has changed: plant this bug anew"
    name = f"fastvlm_mutant_{next(_numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(launcher, mutant.seen_as, module)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.launcher}-{m.seen_as}-{m.name}")
def test_a_mutant_is_caught(
    mutant: Mutant,
    follows_the_error_rule: Rule,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from ttsem.sanitize import KernelFault

    planted(mutant, monkeypatch, tmp_path)
    with pytest.raises((AssertionError, KernelFault)) as caught:
        mutant.check(follows_the_error_rule)
    # an error in the mutant itself would prove nothing
    last = caught.traceback[-1]
    by_a_check = last.name in CHECKS or last.path.stem in ("error_rule", "test_skipped_gradients")
    assert by_a_check or caught.type is KernelFault
