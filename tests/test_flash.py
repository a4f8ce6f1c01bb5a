"""The flash-attn backend against a stand-in with the signatures of its interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import error_rule
import plain
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm import Layout, flash, ops
from fastvlm.ops import dispatch

OPS = ("cross_attention", "self_attention")


def _segments(q: Tensor, k: Tensor, v: Tensor, **s: Any) -> tuple[Tensor, Tensor]:
    """out and lse of one segment, from the definition of flash-attn's arguments."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * s["softmax_scale"]
    if s["softcap"] > 0:
        scores = s["softcap"] * torch.tanh(scores / s["softcap"])
    # aligned at the last row and the last key
    row = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    away = row - torch.arange(k.shape[0])
    hidden = torch.zeros_like(away, dtype=torch.bool)
    if s["causal"]:
        hidden |= away < 0
    if s["window_size_left"] >= 0:
        hidden |= away > s["window_size_left"]
    if s["window_size_right"] >= 0:
        hidden |= -away > s["window_size_right"]
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None])
    return torch.einsum("hqk,khd->qhd", p, v), lse.masked_fill(lse.isneginf(), float("inf"))


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == 0
    assert alibi_slopes is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q
    assert cu_seqlens_k.diff().max() <= max_seqlen_k
    bounds = zip(*(torch.stack((c[:-1], c[1:]), 1).tolist() for c in (cu_seqlens_q, cu_seqlens_k)))
    parts = [
        _segments(
            q[a:b], k[c:d], v[c:d], softmax_scale=softmax_scale, causal=causal,
            window_size_left=window_size_left, window_size_right=window_size_right,
            softcap=softcap,
        )
        for (a, b), (c, d) in bounds
    ]  # fmt: skip
    out = torch.cat([o for o, _ in parts]).to(q.dtype)
    return out, torch.cat([lse for _, lse in parts], 1), q.new_empty(0), torch.empty(2)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    assert deterministic
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    arguments = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)
    with torch.enable_grad():
        again, lse, *_ = _flash_attn_varlen_forward(
            *leaves, *arguments, window_size_left, window_size_right, softcap
        )
        # it works from the numbers of forward: they must have come back as they went
        assert torch.allclose(lse, softmax_lse, rtol=1e-5, atol=1e-5)
        assert torch.equal(again.to(out.dtype), out)
        grads = torch.autograd.grad(again, leaves, dout.float())
    for to, grad in zip((dq, dk, dv), grads):
        assert to is not None
        to.copy_(grad)
    return softmax_lse


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash-attn as far as this machine can have it, for CPU tensors."""
    interface = SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=_flash_attn_varlen_backward,
    )
    monkeypatch.setattr(flash, "_interface", lambda: interface)
    for name in (f"{op}{suffix}" for op in OPS for suffix in ("", "_backward")):
        kernels = dispatch.OPS[name].kernels
        monkeypatch.setitem(kernels, "flash", replace(kernels["flash"], unavailable=lambda: None))
    monkeypatch.setitem(dispatch.CANDIDATES, "CPU", dispatch.CANDIDATES["CPU"])
    dispatch.CANDIDATES["CPU"].append("flash")
    with fastvlm.use("flash"):
        yield
    dispatch.CANDIDATES["CPU"].remove("flash")


CROSS = ([70, 0, 30], [40, 0, 9], [0, 1, 2])
OWN = ([33, 0, 70], [33, 0, 70], [0, 1, 2])
SETTINGS = {
    "cross": (CROSS, {}),
    "cross-cap": (CROSS, {"softcap": 5.0, "scale": 0.3}),
    "causal": (OWN, {"causal": True}),
    "window": (OWN, {"causal": True, "window": 7, "softcap": 20.0}),
    "both-ways": (OWN, {"causal": False, "window": 9}),
}


@pytest.mark.usefixtures("stand_in", "poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", list(SETTINGS))
def test_forward_and_backward(case: str, dtype: torch.dtype, randn: Callable[..., Tensor]) -> None:
    lengths, settings = SETTINGS[case]
    layout = Layout.from_lengths(*lengths)
    run = ops.cross_attention if "cross" in case else ops.self_attention
    shapes = [(sum(lengths[0]), 4, 64)] + [(sum(lengths[1]), 2, 64)] * 2
    inputs = [randn(*shape) for shape in shapes]
    grad = randn(*shapes[0])

    def results(run: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

    formula = lambda q, k, v: plain.attention(q, k, v, *lengths, **settings)  # noqa: E731
    ours = results(lambda q, k, v: run(q, k, v, layout, **settings), dtype)
    for i, (a, b, c) in enumerate(
        zip(ours, results(formula, dtype), results(formula, torch.float64))
    ):
        factor = error_rule.BACKWARD if i else error_rule.FORWARD
        error_rule.check(f"result {i}", a, b, c, factor)


@pytest.mark.usefixtures("stand_in")
def test_a_backward_of_another_backend_can_use_its_stats() -> None:
    """stats mean the same to all: -inf and 0 for a row that sees nothing."""
    layout = Layout.from_lengths([64, 3], [20, 0])
    q, k = torch.randn(67, 2, 16).bfloat16(), torch.randn(20, 2, 16).bfloat16()
    arguments = (q, k, k, *ops.attention.arguments_of(layout), False, 0, 0.25, 0.0, 0.0)
    _, stats = torch.ops.fastvlm.cross_attention(*arguments)
    with fastvlm.use("reference"):
        _, expected = torch.ops.fastvlm.cross_attention(*arguments)
    assert torch.equal(stats[64:], expected[64:])

    def lse(s: Tensor) -> Tensor:
        return s[:64, :, 0].double() * torch.log(torch.tensor(2.0)) + s[:64, :, 1].double().log()

    assert torch.allclose(lse(stats), lse(expected), atol=1e-5)


REFUSED = {
    "float16 and bfloat16 only": {"dtype": torch.float32},
    "another mask": {"dropout_p": 0.1},
    "do not stand together": {"image_of": [1, 0, 1]},
    "multiples of 8": {"d": 20},
    "end at 256": {"d": 264},
    "multiples of 16 bytes": {"shift": 1},
    "fewer than 64 rows": {"rows": 5},
    "nothing to compute": {"rows": 0},
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("why", list(REFUSED))
def test_what_it_does_not_serve_it_says(why: str) -> None:
    change = REFUSED[why]
    rows, d = change.get("rows", 80), change.get("d", 16)
    layout = Layout.from_lengths([rows] * 3, [10, 12], change.get("image_of", [0, 0, 1]))
    dtype, shift = change.get("dtype", torch.bfloat16), change.get("shift", 0)
    q = torch.zeros(3 * rows, 2, d + shift, dtype=dtype)[..., shift:]
    k = torch.zeros(22, 2, d, dtype=dtype)
    with pytest.raises(dispatch.BackendError, match=why):
        ops.cross_attention(q, k, k, layout, dropout_p=change.get("dropout_p", 0.0))


def test_offsets_of_32_bits_are_not_trusted_beyond_their_range() -> None:
    big = torch.empty(2**24, 2, 64, dtype=torch.bfloat16, device="meta")
    call = flash.Call(big, big, big, None, 100, 0.0)
    reason = flash._reason(call)
    assert reason is not None
    assert "2^31" in reason


def test_what_counts_is_how_far_a_slice_reaches() -> None:
    """q, k and v side by side in one tensor, of which each has a third."""
    parts = torch.empty(2**22, 3, 2, 128, dtype=torch.bfloat16, device="meta").unbind(1)
    assert max(x.numel() for x in parts) < 2**31 < flash.span(parts[0])
    assert "2^31" in str(flash._reason(flash.Call(*parts, None, 100, 0.0)))
    # one of them is enough
    near = parts[0].contiguous()
    assert flash._reason(flash.Call(near, near, near, None, 100, 0.0)) is None
    assert "2^31" in str(flash._reason(flash.Call(near, near, parts[2], None, 100, 0.0)))


@pytest.mark.usefixtures("stand_in")
def test_on_rocm_it_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    q = torch.zeros(80, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(dispatch.BackendError, match="on ROCm"):
        ops.cross_attention(q, q, q, Layout.from_lengths([80], [80], [0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", list(SETTINGS))
def test_the_library_itself(case: str, dtype: torch.dtype, randn: Callable[..., Tensor]) -> None:
    """On a GPU, flash-attn in place of the stand-in."""
    if flash.unavailable():
        pytest.skip(str(flash.unavailable()))
    lengths, settings = SETTINGS[case]
    layout = Layout.from_lengths(*lengths).to("cuda")
    run = ops.cross_attention if "cross" in case else ops.self_attention
    shapes = [(sum(lengths[0]), 4, 64)] + [(sum(lengths[1]), 2, 64)] * 2
    leaves = [randn(*shape).cuda().requires_grad_() for shape in shapes]
    grad = randn(*shapes[0]).cuda()
    with fastvlm.use("flash"):
        out = run(*leaves, layout, **settings)
        ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def plainly(kind: torch.dtype) -> list[Tensor]:
        copies = [x.detach().to(kind).requires_grad_() for x in leaves]
        result = plain.attention(*copies, *lengths, **settings)
        return [result.detach(), *torch.autograd.grad(result, copies, grad.to(kind))]

    for i, (a, b, c) in enumerate(zip(ours, plainly(dtype), plainly(torch.float64))):
        factor = error_rule.BACKWARD if i else error_rule.FORWARD
        error_rule.check(f"result {i}", a, b, c, factor)


@pytest.mark.skipif(bool(find_spec("flash_attn")), reason="flash-attn is installed here")
def test_a_machine_without_it_says_so() -> None:
    assert "flash-attn is not installed" in str(flash.unavailable())
    rows = {name: why for name, _, why in dispatch.status("cuda")}
    assert "flash-attn is not installed" in rows["cross_attention"]
    assert "flash" not in rows["rms_norm"]
