"""The ops of the vision tower against plain PyTorch, on each backend that has them."""

from __future__ import annotations

from typing import Any

import error_rule
import plain
import pytest
import torch

from fastvlm import extension, ops

# images, height, width, window, heads, dim: whole windows, edges on either side, less than one
WINDOWS = {
    "whole": (2, 8, 4, 4, 2, 8),
    "edges": (2, 7, 6, 4, 3, 5),
    "small": (1, 3, 2, 4, 2, 16),
    "one": (3, 1, 1, 4, 1, 3),
    "true": (1, 14, 14, 12, 2, 32),
    "huge": (1, 5, 3, 40, 2, 4),
    "wide": (1, 2, 9, 3, 1, 100),
    "empty": (0, 8, 8, 4, 2, 8),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def frozen(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Where a gradient is wanted plain PyTorch serves: this is about the kernels."""
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "zeros"])
@pytest.mark.parametrize("shape", list(WINDOWS))
def test_window_attention(
    shape: str, pad: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    images, height, width, window, heads, dim = WINDOWS[shape]
    wide = 3 * heads * dim
    follows_the_error_rule(
        lambda qkv, p: on(ops.window_attention, qkv, heads, window, pad=p),
        lambda qkv, p: plain.window_attention(qkv, heads, window, p),
        [randn(images, height, width, wide), randn(wide) if pad else None],
    )


def in_tiles(qkv: torch.Tensor, pad: Any, heads: int, window: int) -> torch.Tensor:
    """As on a CPU with AMX, by whatever this one has in its place."""
    if not extension.available():
        pytest.skip(extension.reason() or "")
    scale = (qkv.shape[3] // (3 * heads)) ** -0.5
    out: torch.Tensor = torch.ops.fastvlm_cpu.window_attention(qkv, pad, heads, window, scale, True)
    return out


@pytest.mark.parametrize("pad", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", list(WINDOWS))
def test_windows_in_tiles(shape: str, pad: torch.dtype | None) -> None:
    images, height, width, window, heads, dim = WINDOWS[shape]
    draws = []
    for seed in range(error_rule.DRAWS):
        torch.manual_seed(seed)
        qkv = torch.randn(images, height, width, 3 * heads * dim).bfloat16() * 2
        fill = None if pad is None else torch.randn(3 * heads * dim).to(pad)
        ours = in_tiles(qkv, fill, heads, window)
        theirs = plain.window_attention(
            qkv, heads, window, None if fill is None else fill.bfloat16()
        )
        wide = None if fill is None else fill.double()
        draws.append((ours, theirs, plain.window_attention(qkv.double(), heads, window, wide)))
    assert error_rule.breach(draws, error_rule.FORWARD) is None


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 0.0, -0.3])
def test_windows_of_any_scale(scale: float) -> None:
    """What padding adds to a score is divided by it in tiles, which so small a one is not for."""
    qkv = torch.randn(1, 3, 3, 96).bfloat16()
    ours = ops.window_attention(qkv, 1, 2, scale=scale).double()
    exact = ops.window_attention(qkv.double(), 1, 2, scale=scale)
    assert (ours - exact).abs().max() < 2e-2


def test_a_window_in_tiles_hides_nothing_and_reads_nothing_beside_it() -> None:
    """Tokens of other windows are NaN, and so is one of the window that has one."""
    qkv = torch.full((1, 26, 26, 3 * 64), float("nan")).bfloat16()
    alone = torch.randn(1, 12, 12, 3 * 64).bfloat16()
    qkv[:, :12, 12:24] = alone
    out = in_tiles(qkv, None, 2, 12)
    assert torch.equal(out[:, :12, 12:24], in_tiles(alone, None, 2, 12))
    assert out[:, :12, :12].isnan().all()
    for part in range(3):
        one = alone.clone()
        one[0, 5, 7, part * 64] = float("nan")
        told = in_tiles(one, None, 2, 12).isnan()
        assert told[0, 5, 7, :32].any()
        assert not told[..., 32:].any(), "the other head has none"


@pytest.mark.parametrize(
    "shape", [(1, 577, 2, 32), (2, 100, 3, 5), (1, 1, 1, 8), (3, 17, 2, 63), (0, 9, 2, 4)], ids=str
)
def test_channel_attention(
    shape: tuple[int, ...], on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    images, tokens, groups, dim = shape
    follows_the_error_rule(
        lambda qkv: on(ops.channel_attention, qkv, groups),
        lambda qkv: plain.channel_attention(qkv, groups),
        [randn(images, tokens, 3 * groups * dim)],
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 16), (1, 1, 1, 3), (1, 3, 9, 100), (2, 4, 4, 63), (0, 4, 4, 8)], ids=str
)
def test_depthwise_conv_norm(
    shape: tuple[int, ...], bias: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    c = shape[3]
    follows_the_error_rule(
        lambda *x: on(ops.depthwise_conv_norm, *x),
        plain.depthwise_conv_norm,
        [randn(*shape), randn(c, 1, 3, 3), randn(c) if bias else None, randn(c), randn(c)],
    )


def test_norm_next_to_a_large_mean(on: Any, follows_the_error_rule: Any) -> None:
    x = 1000 + torch.randn(1, 4, 4, 48)
    zeros = torch.zeros(48, 1, 3, 3)
    follows_the_error_rule(
        lambda *x: on(ops.depthwise_conv_norm, *x),
        plain.depthwise_conv_norm,
        [x, zeros, None, torch.ones(48), torch.zeros(48)],
    )


# around the blocks of rows (96), of columns (128), of depth (256), and none of them
PRODUCTS = [(65, 3, 5), (96, 256, 128), (193, 300, 257), (1000, 17, 63), (0, 8, 8), (70, 513, 130)]


@pytest.mark.parametrize("factors", [True, False], ids=["factors", "plain"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_residual_linear(
    shape: tuple[int, int, int], factors: bool, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, n = shape
    each = torch.tensor([0.0]) if factors and m % 5 else torch.rand(5) if factors else None
    follows_the_error_rule(
        lambda x, w, b, r: on(ops.residual_linear, x, w, b, r, factors=each),
        lambda x, w, b, r: plain.residual_linear(x, w, b, r, each),
        [randn(m, k), randn(n, k, scale=k**-0.5), randn(n), randn(m, n)],
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_residual_gelu_mlp(
    shape: tuple[int, int, int], approximate: str, on: Any, randn: Any, follows_the_error_rule: Any
) -> None:
    m, k, f = shape
    follows_the_error_rule(
        lambda x, w1, b1, w2, b2, r: on(
            ops.residual_gelu_mlp, x, w1, b1, w2, b2, r, approximate=approximate
        ),
        lambda x, w1, b1, w2, b2, r: r + plain.gelu_mlp(x, w1, b1, w2, b2, approximate),
        [
            randn(m, k),
            randn(f, k, scale=k**-0.5),
            randn(f),
            randn(k, f, scale=f**-0.5),
            randn(k),
            randn(m, k),
        ],
    )


def test_residual_keeps_its_own_dtype() -> None:
    """A stream of float32 under products of bfloat16, as autocast has it."""
    x, w = torch.randn(200, 32), torch.randn(16, 32)
    residual = torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.residual_linear(x, w, None, residual)
    assert out.dtype == torch.float32
    exact = residual.double() + x.bfloat16().double() @ w.double().t()
    assert (out - exact).abs().max() < 0.1
    low = ops.residual_linear(x.bfloat16(), w.bfloat16(), None, residual)
    assert low.dtype == torch.float32


def test_norm_gives_what_the_product_behind_it_takes() -> None:
    x = torch.randn(1, 4, 5, 8)
    arguments = (torch.randn(8, 1, 3, 3), torch.randn(8), torch.ones(8), torch.zeros(8))
    h, y = ops.depthwise_conv_norm(x, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        same, low = ops.depthwise_conv_norm(x, *arguments)
    asked = ops.depthwise_conv_norm(x, *arguments, dtype=torch.bfloat16)
    for h16, y16 in ((same, low), asked):
        assert torch.equal(h16, h)
        assert torch.equal(y16, y.bfloat16())


@pytest.mark.parametrize("workers", [1, 2])
def test_bits_do_not_depend_on_threads(workers: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    qkv = torch.randn(2, 24, 24, 3 * 64)
    mlp = [torch.randn(s) * 0.1 for s in [(1152, 64), (256, 64), (256,), (64, 256), (64,)]]
    results = []
    try:
        for threads in (workers, 3):
            torch.set_num_threads(threads)
            h = torch.ones(1152, 64)
            results.append(
                (
                    ops.channel_attention(qkv.flatten(1, 2), 2),
                    ops.window_attention(qkv, 2, 12),
                    ops.residual_gelu_mlp(*mlp, h),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    qkv = torch.randn(1, 4, 4, 24)
    qkv[0, 1, 2, 3] = bad
    assert not ops.window_attention(qkv, 1, 4).isfinite().all()
    assert not ops.channel_attention(qkv.flatten(1, 2), 1).isfinite().all()
    x = torch.randn(100, 8)
    x[7, 1] = bad
    out = ops.residual_linear(x, torch.randn(9, 8), None, torch.zeros(100, 9))
    assert not out[7].isfinite().any()
    assert out[8].isfinite().all()


def test_gradients() -> None:
    """To any order, by PyTorch: the ops say so."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    checks = [
        (lambda qkv, pad: ops.window_attention(qkv, 2, 2, pad=pad), (leaf(1, 3, 2, 12), leaf(12))),
        (lambda qkv: ops.channel_attention(qkv, 2), (leaf(1, 3, 12),)),
        (
            lambda *x: ops.depthwise_conv_norm(*x)[1],
            (leaf(1, 2, 3, 4), leaf(4, 1, 3, 3), leaf(4), leaf(4), leaf(4)),
        ),
        (ops.residual_linear, (leaf(3, 2), leaf(4, 2), leaf(4), leaf(3, 4))),
        (ops.residual_gelu_mlp, (leaf(2, 3), leaf(4, 3), leaf(4), leaf(3, 4), leaf(3), leaf(2, 3))),
    ]
    for run, inputs in checks:
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def t(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(*shape, **kwargs)


REFUSED = [
    (lambda: ops.window_attention(t(2, 3, 12), 2, 4), ValueError, "qkv must be of shape"),
    (lambda: ops.window_attention(t(1, 2, 2, 13), 2, 4), ValueError, "three times the channels"),
    (
        lambda: ops.window_attention(t(1, 2, 2, 12), 3, 4),
        ValueError,
        "heads must be a divisor of 4",
    ),
    (lambda: ops.window_attention(t(1, 2, 2, 12), 2, 0), ValueError, "window must be a whole num"),
    (
        lambda: ops.window_attention(t(1, 2, 2, 12), 2, 2, pad=t(4)),
        ValueError,
        r"pad must be of .*12",
    ),
    (lambda: ops.window_attention(t(1, 2, 2, 12), 2, 2, scale="1"), ValueError, "scale must be"),
    (lambda: ops.channel_attention([1], 2), TypeError, "qkv must be a torch.Tensor"),
    (lambda: ops.channel_attention(t(1, 2, 12), True), ValueError, "groups must be a whole number"),
    (
        lambda: ops.depthwise_conv_norm(t(1, 2, 2, 4), t(4, 1, 5, 5), None, t(4), t(4)),
        ValueError,
        r"weight must be of shape \[4, 1, 3, 3\]",
    ),
    (
        lambda: ops.depthwise_conv_norm(
            *(t(1, 2, 2, 4), t(4, 1, 3, 3), None, t(4), t(4)), dtype=torch.int8
        ),
        ValueError,
        "dtype must be a float dtype",
    ),
    (
        lambda: ops.depthwise_conv_norm(t(1, 2, 2, 4), t(4, 1, 3, 3), None, None, t(4)),
        TypeError,
        "norm_weight must be a torch.Tensor; got None",
    ),
    (lambda: ops.residual_linear(t(3, 2), t(4, 2), None, t(2, 4)), ValueError, "residual must be"),
    (lambda: ops.residual_linear(t(3, 2), t(4, 3), None, t(3, 4)), ValueError, "weight must be of"),
    (
        lambda: ops.residual_linear(t(3, 2), t(4, 2).half(), None, t(3, 4)),
        ValueError,
        "weight must be of the dtype of x",
    ),
    (
        lambda: ops.residual_linear(t(3, 2), t(4, 2), None, t(3, 4), factors=t(2)),
        ValueError,
        "factors must be of a number that divides the 3 rows",
    ),
    (
        lambda: ops.residual_gelu_mlp(
            t(3, 2), t(4, 2), None, t(2, 4), None, t(3, 2), approximate="erf"
        ),
        ValueError,
        "approximate must be one of",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[2][:40])
def test_refused(case: Any) -> None:
    make, kind, message = case
    with pytest.raises(kind, match=message):
        make()
