"""Attention over packed rows: cross_attention, self_attention, cached_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm import checks
from fastvlm.layout import Layout
from fastvlm.ops._autograd import autocast, needs_grad, once_differentiable, seed_for, wanted
from fastvlm.ops.dispatch import define
from fastvlm.reference import attention as reference
from fastvlm.reference.merge import lse_of

_SHAPE = (
    # SymInt: as int the longest segment would be a constant of a compiled graph, one graph for each
    "Tensor q_offsets, Tensor kv_offsets, Tensor image_of, Tensor? rows_by_image, "
    "Tensor reader_offsets, Tensor? seed, SymInt max_q, SymInt max_kv, SymInt max_readers, "
    "bool causal, int window, float scale, float softcap, float dropout_p"
)
_BIAS = "Tensor? position_bias=None"

_WHERE = 6  # of these, the tensors: where the rows are, and the seed
_NEEDS = 16  # behind q, k and v of a backward: out, stats and these come before what is wanted


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    stats = q.new_empty(*q.shape[:2], 2, dtype=reference.compute_dtype(q))
    return out, stats


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs, bias, need_bias = (*rest[_NEEDS:], None, False)[:3]
    grads = [x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip((q, k, v), needs)]
    of_bias = q if bias is None else bias
    return *grads, of_bias.new_empty(of_bias.shape if need_bias else 0)


def _define(name: str) -> tuple[Any, Any]:
    forward = define(
        name,
        f"(Tensor q, Tensor k, Tensor v, {_SHAPE}, {_BIAS}, int window_after=0) "
        "-> (Tensor, Tensor)",
        reference.attention,
        _fake,
    )
    backward = define(
        f"{name}_backward",
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, {_SHAPE}, "
        f"bool[3] needs, {_BIAS}, bool need_bias=False, int window_after=0, "
        "Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor, Tensor)",
        reference.attention_backward,
        _fake_backward,
    )
    return forward, backward


_CROSS = _define("cross_attention")
_SELF = _define("self_attention")
_OF_CACHE = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? ancestry, int window, "
    f"float scale, float softcap, {_BIAS})"
)


def _fake_cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v_cache.shape[3])


def _fake_cached_lse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=reference.compute_dtype(q))
    return _fake_cached(q, k_cache, v_cache), lse


_CACHED = define(
    "cached_attention", f"{_OF_CACHE} -> Tensor", reference.cached_attention, _fake_cached
)
_CACHED_LSE = define(
    "cached_attention_lse",
    f"{_OF_CACHE} -> (Tensor, Tensor)",
    reference.cached_attention_lse,
    _fake_cached_lse,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: tuple[Any, Any, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_bias: Tensor | None,
        window_after: int,
        *rest: Any,
    ) -> Any:
        run, backward_op, with_lse = ops
        out, stats = run(q, k, v, *rest, position_bias, window_after)
        ctx.save_for_backward(position_bias, q, k, v, out, stats, *rest[:_WHERE])
        ctx.backward_op, ctx.settings = backward_op, rest[_WHERE:]
        ctx.window_after = window_after
        return (out, lse_of(stats)) if with_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[1:5])
        position_bias, *saved = ctx.saved_tensors
        asked = needs[:3], position_bias, needs[3], ctx.window_after, grad_lse
        grads = ctx.backward_op(grad_out, *saved, *ctx.settings, *asked)
        return (None, *wanted(grads, needs), *[None] * (1 + _WHERE + len(ctx.settings)))


def _run(
    ops: tuple[Any, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    return_lse: bool,
    position_bias: Tensor | None = None,
    window_after: int = 0,
) -> Any:
    q, k, v = autocast(q, k, v)
    seed = seed_for(q, dropout_p)
    where = arguments_of(layout, seed)
    settings = (causal, window, scale, softcap, dropout_p)
    beside = (position_bias, window_after)
    if needs_grad(q, k, v, position_bias):
        return _Attention.apply((*ops, return_lse), q, k, v, *beside, *where, *settings)
    out, stats = ops[0](q, k, v, *where, *settings, *beside)
    return (out, lse_of(stats)) if return_lse else out


def arguments_of(layout: Layout, seed: Tensor | None = None) -> tuple[Any, ...]:
    """What the schemas take of a layout, up to `max_readers`."""
    return (
        layout.q_offsets,
        layout.kv_offsets,
        layout.image_of,
        layout.rows_by_image,
        layout.reader_offsets,
        seed,
        layout.max_q,
        layout.max_kv,
        layout.max_readers,
    )


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    checks.is_tensor(op, q=q, k=k, v=v)
    if not isinstance(layout, Layout):
        raise TypeError(f"fastvlm.{op}: layout must be a Layout; got {checks.describe(layout)}")
    checks.is_float(op, "q", q)
    checks.same_kind(op, "q", q, k=k, v=v)
    if q.device.type != "meta" and layout.device != q.device:
        raise checks.fail(op, "layout", f"on the device of q ({q.device})", layout.device)
    if q.dim() != 3:
        raise checks.fail(op, "q", "of shape [tokens, heads, head_dim]", q)
    checks.has_shape(op, "k", k, [None, None, q.shape[2]])
    checks.has_shape(op, "v", v, [k.shape[0], k.shape[1], None])
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        wanted = f"of a number of heads that divides the {q.shape[1]} heads of q"
        raise checks.fail(op, "k", wanted, k)
    if q.shape[0] != layout.num_tokens:
        raise checks.fail(op, "q", f"of {layout.num_tokens} rows, where layout's segments end", q)
    if k.shape[0] != layout.num_kv_tokens:
        raise checks.fail(op, "k", f"of {layout.num_kv_tokens} rows, where layout's images end", k)


def _check_window(op: str, window: int | None) -> int:
    """0 stands for no window inside the schemas."""
    if window is None:
        return 0
    if not isinstance(window, int) or window <= 0:
        raise checks.fail(op, "window", "a whole number above 0, or None", window)
    return window


def _check_sides(op: str, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """How near keys must be before a row and behind it, its own included; 0 and 0 for no window,
    and 0 behind for as many as before."""
    if not isinstance(window, tuple):
        return _check_window(op, window), 0
    if len(window) != 2 or not all(isinstance(n, int) and n >= 0 for n in window):
        wanted = "a whole number above 0, a pair of them from 0 (before, behind), or None"
        raise checks.fail(op, "window", wanted, window)
    return window[0] + 1, window[1] + 1


def _check_bias(op: str, q: Tensor, position_bias: Tensor | None) -> Tensor | None:
    if position_bias is None:
        return None
    checks.is_tensor(op, position_bias=position_bias)
    if position_bias.dtype != reference.compute_dtype(q):
        wanted = "float32 (float64 beside a float64 q)"
        raise checks.fail(op, "position_bias", wanted, position_bias)
    checks.same_device(op, "q", q, position_bias=position_bias)
    checks.has_shape(op, "position_bias", position_bias, [q.shape[1], None])
    if position_bias.shape[1] % 2 == 0:
        wanted = "of an odd number of columns, one for each distance from -D to D"
        raise checks.fail(op, "position_bias", wanted, position_bias)
    return position_bias


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Attention of caption rows to the tokens of the image that each caption reads.

    Not causal, so all readers of an image (captions, languages, beams) are just more query rows
    against one copy of its K/V; the same call trains, prefills and decodes.

    q: [Tq, H, D]. k, v: [Tk, Hkv, D], H a multiple of Hkv. float32, bfloat16, float16, one dtype.
    layout: which rows form a segment and which image it reads (`Layout`), on q's device.
    scale: multiplies q.k; default D ** -0.5. softcap: scores become softcap * tanh(score / softcap)
    (Gemma-2, arXiv 2408.00118). dropout_p: of the attention probabilities, in [0, 1).
    return_lse: give the logsumexp of each row's scores as well, by which `merge_attention` joins
    two attentions; dropout does not change it.

    Returns [Tq, H, D] in q's dtype; zeros for a row whose image has no token. With return_lse a
    pair, the second [Tq, H] in float32 (float64 for float64), -inf for such a row. Gradients for q,
    k and v, through both; dK and dV are sums over all readers of an image, deterministic. A second
    derivative is refused (RuntimeError).

    Raises TypeError for what is no tensor or Layout, ValueError for shapes, dtypes, devices and
    numbers that do not fit; the message names the argument.
    """
    _check("cross_attention", q, k, v, layout)
    cap = checks.softcap_value("cross_attention", softcap)
    dropout_p = checks.probability("cross_attention", "dropout_p", dropout_p)
    factor = checks.scale_value("cross_attention", scale, q.shape[-1])
    return _run(_CROSS, q, k, v, layout, False, 0, factor, cap, dropout_p, return_lse)


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Attention inside each packed segment; no row sees another segment.

    q: [T, H, D]. k, v: [T, Hkv, D], H a multiple of Hkv. float32, bfloat16, float16, one dtype.
    layout: the segments; each must read itself (`Layout.from_padded(mask)`,
    `Layout.from_lengths(lengths)`).
    causal: row r sees keys 0..r of its segment. window w: only keys less than w away (sliding
    window; with causal the last w keys, the row's own included); (a, b): at most a keys before the
    row's own, and b behind it. position_bias: float32
    [H, 2D + 1], added to the scores, cap included, by the distance of a key from its query within
    the segment: column clamp(key - query, -D, D) + D (T5's relative positions, arXiv 1910.10683,
    with their buckets looked up once for each distance). Its gradient is a sum over all pairs of a
    distance, deterministic. scale, softcap, dropout_p, return_lse and errors: as in
    `cross_attention`. A second derivative is refused (RuntimeError).

    Returns [T, H, D] in q's dtype; with return_lse [T, H] as well.
    """
    _check("self_attention", q, k, v, layout)
    if not layout.reads_itself:
        raise checks.fail("self_attention", "layout", "one whose segments read themselves", layout)
    cap = checks.softcap_value("self_attention", softcap)
    dropout_p = checks.probability("self_attention", "dropout_p", dropout_p)
    before, after = _check_sides("self_attention", window)
    factor = checks.scale_value("self_attention", scale, q.shape[-1])
    bias = _check_bias("self_attention", q, position_bias)
    settings = (bool(causal), before, factor, cap, dropout_p, return_lse)
    return _run(_SELF, q, k, v, layout, *settings, bias, after)


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    ancestry: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """One new token per row against a cache that is never reordered: a decoding step.

    q: [R, H, D]. k_cache, v_cache: [N, T, Hkv, D], any strides (transformers' [N, Hkv, T, D] is
    ``.transpose(1, 2)`` of it). lengths: int32 or int64 [R], the positions filled for each row, the
    new one included. ancestry: int32 [R, T], the cache row that holds each position of each row,
    so that a beam search copies no cache; a negative entry is a position that the row does not see
    (padding). Without it row r reads cache row r, and N must be R or more.
    window w: only the last w positions. scale, softcap: as in `cross_attention`. position_bias: as
    in `self_attention`, from a query that stands at the last of its positions. return_lse: as in
    `cross_attention`.

    Returns [R, H, D] in q's dtype; zeros for a row with no visible position; with return_lse [R, H]
    as well. Decoding only: with gradients on and an input that wants one, the differentiable
    reference serves.

    Raises TypeError or ValueError; the message names the argument. Values of lengths and ancestry
    are trusted (checking them would wait for the device).
    """
    op = "cached_attention"
    checks.is_tensor(op, q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    checks.is_float(op, "q", q)
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    checks.same_kind(op, "q", q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3:
        raise checks.fail(op, "q", "of shape [rows, heads, head_dim]", q)
    position_bias = _check_bias(op, q, position_bias)
    checks.has_shape(op, "k_cache", k_cache, [None, None, None, q.shape[2]])
    checks.has_shape(op, "v_cache", v_cache, [*k_cache.shape[:3], None])
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        wanted = f"of a number of heads that divides the {q.shape[1]} heads of q"
        raise checks.fail(op, "k_cache", wanted, k_cache)
    checks.has_shape(op, "lengths", lengths, [q.shape[0]])
    for name, tensor in (("lengths", lengths), ("ancestry", ancestry)):
        if tensor is None:
            continue
        checks.is_tensor(op, **{name: tensor})
        if tensor.dtype not in (torch.int32, torch.int64):
            raise checks.fail(op, name, "int32 or int64", tensor)
        if tensor.device != q.device:
            raise checks.fail(op, name, f"on the device of q ({q.device})", tensor)
    if ancestry is not None:
        checks.has_shape(op, "ancestry", ancestry, [q.shape[0], k_cache.shape[1]])
        ancestry = ancestry.to(torch.int32)
    elif k_cache.shape[0] < q.shape[0]:
        raise checks.fail(op, "k_cache", f"of {q.shape[0]} rows or more, as q", k_cache)
    settings = (
        _check_window(op, window),
        checks.scale_value(op, scale, q.shape[-1]),
        checks.softcap_value(op, softcap),
    )
    arguments = (q, k_cache, v_cache, lengths.to(torch.int32), ancestry, *settings, position_bias)
    if needs_grad(q, k_cache, v_cache, position_bias):
        both = reference.cached_attention_lse(*arguments)
        return both if return_lse else both[0]
    return (_CACHED_LSE if return_lse else _CACHED)(*arguments)
