"""Attention over packed rows, in plain PyTorch.

Scores are ``s = scale * q.k``, then ``softcap * tanh(s / softcap)`` where a cap is given (Gemma-2,
arXiv 2408.00118), plus the bias of the distance from query to key where there is one (T5, arXiv
1910.10683), then softmax over the visible keys. Computed in float32 (float64 for float64 inputs),
one image at a time, so K/V of an image are touched once for all its readers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvlm.reference._random import keep_scale

LOG2E = 1.4426950408889634


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Block:
    """One image with the query rows that read it: scores [Hkv, G, R, K] and their mask."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        rows: Tensor,
        keys: slice,
        positions: Tensor | None,
        causal: bool,
        window: int,
        scale: float,
        softcap: float,
        position_bias: Tensor | None,
        window_after: int,
    ):
        dtype = compute_dtype(q)
        heads, kv_heads = q.shape[1], k.shape[1]
        self.rows, self.keys = rows, keys
        self.q = q[rows].to(dtype).unflatten(1, (kv_heads, heads // kv_heads))  # [R, Hkv, G, D]
        self.k = k[keys].to(dtype)  # [K, Hkv, D]
        raw = torch.einsum("rhgd,khd->hgrk", self.q, self.k) * scale
        self.cap_slope: Tensor | None = None
        if softcap > 0:
            t = torch.tanh(raw / softcap)
            self.cap_slope = 1 - t * t
            raw = softcap * t
        self.entries: Tensor | None = None
        if position_bias is not None and positions is not None:
            self.entries = _entries(positions[rows], self.k.shape[0], position_bias)
            bias = position_bias.to(dtype)[:, self.entries]  # [H, R, K]
            raw = raw + bias.unflatten(0, (kv_heads, heads // kv_heads))
        if positions is not None and (causal or window > 0):
            distance = positions[rows].unsqueeze(1) - torch.arange(self.k.shape[0], device=q.device)
            hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
            if window > 0:
                hidden = hidden | (distance >= window) | (-distance >= (window_after or window))
            raw = raw.masked_fill(hidden, float("-inf"))
        self.scores = raw

    def probabilities(self) -> Tensor:
        """[Hkv, G, R, K]; zeros in a row that sees no key."""
        p = torch.softmax(self.scores, -1)
        return torch.where(torch.isneginf(self.scores), 0, p)

    def keep(self, seed: Tensor | None, dropout_p: float, heads: int) -> Tensor | None:
        """Dropout scale [Hkv, G, R, K]; counter = (row * heads + head) * 2^32 + key in image."""
        if seed is None or dropout_p == 0.0:
            return None
        kv_heads, group, _, num_keys = self.scores.shape
        head = torch.arange(heads, device=self.rows.device).view(kv_heads, group, 1, 1)
        key = torch.arange(num_keys, device=self.rows.device)
        counter = ((self.rows.view(1, 1, -1, 1) * heads + head) << 32) + key
        return keep_scale(seed, counter, dropout_p, self.scores.dtype)


def _entries(places: Tensor, keys: int, position_bias: Tensor) -> Tensor:
    """The column [R, K] of position_bias [H, 2D + 1] for each row and key."""
    reach = position_bias.shape[1] // 2
    distance = torch.arange(keys, device=places.device) - places.unsqueeze(1)
    return distance.clamp(-reach, reach) + reach


def _add_at(sums: Tensor, entries: Tensor, values: Tensor) -> None:
    """Add values [H, N] to sums [H, E] at entries [N], in one order."""
    if sums.is_cuda:  # unlike scatter_add_ there
        heads = torch.arange(sums.shape[0], device=sums.device).unsqueeze(1)
        sums.index_put_((heads, entries), values, accumulate=True)
    else:
        sums.scatter_add_(1, entries.expand(sums.shape[0], -1), values)


def _blocks(
    q: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    image_of: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    position_bias: Tensor | None,
    window_after: int,
) -> Iterator[_Block]:
    starts, ends = q_offsets[:-1].tolist(), q_offsets[1:].tolist()
    bounds, images = kv_offsets.tolist(), image_of.tolist()
    readers: dict[int, list[Tensor]] = {}
    positions = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    for start, end, image in zip(starts, ends, images):
        if end > start:
            rows = torch.arange(start, end, device=q.device)
            positions[start:end] = rows - start
            readers.setdefault(image, []).append(rows)
    for image, segments in readers.items():
        keys = slice(bounds[image], bounds[image + 1])
        if keys.stop > keys.start:
            rows = torch.cat(segments)
            mask = (causal, window, scale, softcap, position_bias, window_after)
            yield _Block(q, k, rows, keys, positions, *mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    image_of: Tensor,
    rows_by_image: Tensor | None,
    reader_offsets: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_kv: int,
    max_readers: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    position_bias: Tensor | None = None,
    window_after: int = 0,
) -> tuple[Tensor, Tensor]:
    """Forward of cross_attention and self_attention: out [Tq, H, D] and stats [Tq, H, 2].

    stats: the largest score of each row, times log2 e (kernels count in powers of two), and the sum
    of exp(score - largest). Their logsumexp in one float would lose digits that a backward needs.
    window 0 and softcap 0 stand for none. A row sees keys less than window before it and, where it
    sees what comes, less than window_after behind it (0: as many as before). A row without a
    visible key gives zeros, (-inf, 0).
    """
    dtype = compute_dtype(q)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    stats = q.new_zeros(*q.shape[:2], 2, dtype=dtype)
    stats[..., 0] = float("-inf")
    mask = (causal, window, scale, softcap, position_bias, window_after)
    for block in _blocks(q, k, q_offsets, kv_offsets, image_of, *mask):
        largest = block.scores.amax(-1)  # [Hkv, G, R]
        base = largest.masked_fill(largest.isneginf(), 0)
        total = torch.exp(block.scores - base.unsqueeze(-1)).sum(-1)
        p = block.probabilities()
        keep = block.keep(seed, dropout_p, q.shape[1])
        if keep is not None:
            p = p * keep
        o = torch.einsum("hgrk,khd->rhgd", p, v[block.keys].to(dtype))
        out[block.rows] = o.flatten(1, 2).to(q.dtype)
        parts = torch.stack((largest * LOG2E, total), -1)
        stats[block.rows] = parts.flatten(0, 1).transpose(0, 1)
    return out, stats


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    image_of: Tensor,
    rows_by_image: Tensor | None,
    reader_offsets: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_kv: int,
    max_readers: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    needs: list[bool],
    position_bias: Tensor | None = None,
    need_bias: bool = False,
    window_after: int = 0,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, those that needs[i] asks for, and with need_bias the gradient of position_bias;
    the probabilities are recomputed.

    grad_lse [Tq, H]: that of the logsumexp of a row's scores, where somebody has read it. out and
    stats are there for kernels, which get by with them instead of whole rows. dK and dV
    of an image are sums over all its readers, in one product: deterministic.
    """
    dtype = compute_dtype(q)
    dq, dk, dv = (
        x.new_zeros(x.shape) if need else x.new_empty(0) for x, need in zip((q, k, v), needs)
    )
    dbias = q.new_empty(0) if position_bias is None else position_bias.new_empty(0)
    if need_bias and position_bias is not None:
        dbias = torch.zeros_like(position_bias, dtype=dtype)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    mask = (causal, window, scale, softcap, position_bias, window_after)
    for block in _blocks(q, k, q_offsets, kv_offsets, image_of, *mask):
        rows, keys = block.rows, block.keys
        p = block.probabilities()
        g = grad_out[rows].to(dtype).unflatten(1, (kv_heads, group))  # [R, Hkv, G, D]
        keep = block.keep(seed, dropout_p, q.shape[1])
        if needs[2]:
            dropped = p if keep is None else p * keep
            dv[keys] = torch.einsum("hgrk,rhgd->khd", dropped, g).to(v.dtype)
        if not (needs[0] or needs[1] or need_bias):
            continue
        dp = torch.einsum("rhgd,khd->hgrk", g, v[keys].to(dtype))
        if keep is not None:
            dp = dp * keep
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            of_lse = grad_lse[rows].to(dtype).unflatten(1, (kv_heads, group))  # [R, Hkv, G]
            delta = delta - of_lse.permute(1, 2, 0).unsqueeze(-1)
        ds = p * (dp - delta)
        if need_bias and block.entries is not None:
            _add_at(dbias, block.entries.flatten(), ds.flatten(0, 1).flatten(1))
        if block.cap_slope is not None:
            ds = ds * block.cap_slope
        ds = ds * scale
        if needs[0]:
            dq[rows] = torch.einsum("hgrk,khd->rhgd", ds, block.k).flatten(1, 2).to(q.dtype)
        if needs[1]:
            dk[keys] = torch.einsum("hgrk,rhgd->khd", ds, block.q).to(k.dtype)
    return dq, dk, dv, dbias


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestry: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    position_bias: Tensor | None = None,
) -> Tensor:
    """`cached_attention_lse` without the logsumexp."""
    settings = (lengths, ancestry, window, scale, softcap, position_bias)
    return cached_attention_lse(q, k_cache, v_cache, *settings)[0]


def cached_attention_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestry: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One new token per row: q [R, H, D] against caches [N, T, Hkv, D] -> [R, H, D], and the
    logsumexp of its scores [R, H], -inf for a row without a visible key.

    Position t of row r is read from cache row ancestry[r, t] (row r itself without ancestry); a
    negative entry is not visible. Only 0 <= t < lengths[r], and with a window t >= lengths[r] - w.
    position_bias is read at the distance of t from the last of them, lengths[r] - 1.
    """
    dtype = compute_dtype(q)
    kv_heads, time = k_cache.shape[2], k_cache.shape[1]
    t = torch.arange(time, device=q.device)
    visible = t < lengths.unsqueeze(1)
    if window > 0:
        visible = visible & (t >= lengths.unsqueeze(1) - window)
    keys, values = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    if ancestry is not None:
        visible = visible & (ancestry >= 0)
        rows = ancestry.clamp_min(0).long()
        keys, values = k_cache[rows, t], v_cache[rows, t]  # [R, T, Hkv, D]
    # a cache slot that is not visible may hold anything, NaN included
    hidden = ~visible.view(*visible.shape, 1, 1)
    keys = keys.to(dtype).masked_fill(hidden, 0)
    values = values.to(dtype).masked_fill(hidden, 0)
    grouped = q.to(dtype).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("rhgd,rthd->rhgt", grouped, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        entries = _entries(lengths.long() - 1, time, position_bias)
        bias = position_bias.to(dtype)[:, entries].transpose(0, 1)  # [R, H, T]
        scores = scores + bias.unflatten(1, (kv_heads, -1))
    mask = visible.view(visible.shape[0], 1, 1, time)
    scores = scores.masked_fill(~mask, float("-inf"))
    any_visible = visible.any(1).view(-1, 1, 1, 1)
    p = torch.softmax(scores.masked_fill(~any_visible, 0), -1) * any_visible
    out = torch.einsum("rhgt,rthd->rhgd", p, values).flatten(1, 2).to(q.dtype)
    # of a row that sees nothing a gradient must be 0, and not what becomes of -inf - -inf
    seen = scores.masked_fill(~any_visible, 0).logsumexp(-1)
    lse = torch.where(any_visible.squeeze(-1), seen, float("-inf"))
    return out, lse.flatten(1, 2)
