"""Launcher of rope: q and k, forward or backward, in one launch."""

from __future__ import annotations

from torch import Tensor

from fastvlm.triton.common import Launcher, cdiv, dense_last, device_of, lanes, next_power_of_2
from fastvlm.triton.kernels import rope as kernels

# elements of a half that a thread turns: 128 bits of a 16-bit dtype
_EACH = 8
# heads that share the angles of their token in a program's registers: many where there are tokens
# for every multiprocessor, few where a step has a row for each beam
_TOGETHER, _APART, _MANY_TOKENS = 8, 2, 1024


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, cos, sin = (dense_last(x) for x in (q, k, cos, sin))
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, heads, d = q.shape
    kv_heads, rotary = k.shape[1], cos.shape[1]
    half = max(1, next_power_of_2(rotary // 2))
    # a warp's worth of elements for each, or what one token has
    block_t = max(1, lanes(q) * _EACH // half)
    together = _TOGETHER if tokens >= _MANY_TOKENS else _APART
    blocks_q, blocks_k = cdiv(heads, together), cdiv(kv_heads, together)
    if tokens and d and blocks_q + blocks_k:
        with device_of(q):
            kernels.rope[(cdiv(tokens, block_t), blocks_q + blocks_k)](
                q, k, cos, sin, out_q, out_k,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
                tokens, heads, kv_heads, blocks_q, D=d, ROTARY=rotary, BACK=back,
                BLOCK_T=block_t, BLOCK_H=together, BLOCK_HALF=half,
                BLOCK_PASS=next_power_of_2(max(1, d - rotary)),
                num_warps=max(1, half // (_EACH * lanes(q))),
            )  # fmt: skip
    return out_q, out_k


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _run(q, k, cos, sin, False)


def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _run(grad_q, grad_k, cos, sin, True)


LAUNCHERS = {"rope": Launcher(_rope), "rope_backward": Launcher(_rope_backward)}
