"""Launcher of rope: q and k, forward or backward, in one launch."""

from __future__ import annotations

from torch import Tensor

from fastvlm.triton.common import Launcher, cdiv, dense_last, device_of, lanes, next_power_of_2
from fastvlm.triton.kernels import rope as kernels

# elements of a half that one program turns at once
_TILE = 1024
# and of them those of a thread: 128 bits of a 16-bit dtype
_EACH = 8


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, cos, sin = (dense_last(x) for x in (q, k, cos, sin))
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, heads, d = q.shape
    kv_heads, rotary = k.shape[1], cos.shape[1]
    half = max(1, next_power_of_2(rotary // 2))
    together = max(1, min(next_power_of_2(max(heads, kv_heads)), _TILE // half))
    blocks_q, blocks_k = cdiv(heads, together), cdiv(kv_heads, together)
    if tokens and d and blocks_q + blocks_k:
        with device_of(q):
            kernels.rope[(tokens, blocks_q + blocks_k)](
                q, k, cos, sin, out_q, out_k,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
                heads, kv_heads, BLOCKS_Q=blocks_q, D=d, ROTARY=rotary, BACK=back,
                BLOCK_H=together, BLOCK_HALF=half, BLOCK_PASS=next_power_of_2(max(1, d - rotary)),
                num_warps=min(4, max(1, together * half // (_EACH * lanes(q)))),
            )  # fmt: skip
    return out_q, out_k


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _run(q, k, cos, sin, False)


def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _run(grad_q, grad_k, cos, sin, True)


LAUNCHERS = {"rope": Launcher(_rope), "rope_backward": Launcher(_rope_backward)}
