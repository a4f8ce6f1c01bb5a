"""flash-attn, where it is installed and able: packed attention, forward and backward.

Readers of one image that stand together are one query segment to it, so an image's keys and values
are shared there too. RULES says what it serves; everything else is the Triton kernels'. Not timed
against them yet: it is preferred where it is known to be near the limit of the hardware, products
of many rows in 16 bits, and left out where its grid is (a few rows per image: it would read the
keys with few programs).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.ops.dispatch import Kernel, register

OLDEST = (2, 8)
OLDEST_CAPABILITY = (8, 0)
FEWEST_ROWS = 64
MOST_ELEMENTS = 2**31 - 1
_LOG2E = 1.0 / math.log(2.0)


def aligned(x: Tensor) -> bool:
    """Whether every head of every row starts at a multiple of 16 bytes (of 16-bit elements)."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def span(x: Tensor) -> int:
    """Elements from the first that a kernel addresses to the last: more than x has where it is a
    slice of what holds q, k and v side by side."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


class Call(NamedTuple):
    """What a call is judged by."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows_by_image: Tensor | None
    max_readers: int
    dropout_p: float
    position_bias: Tensor | None = None
    grad_lse: Tensor | None = None


# a rule that does not hold says why flash-attn does not serve the call
RULES: list[tuple[Callable[[Call], bool], str]] = [
    (
        lambda c: torch.version.hip is None,
        "on ROCm it is another library, whose results are unknown",
    ),
    (lambda c: c.q.dtype in (torch.float16, torch.bfloat16), "it has float16 and bfloat16 only"),
    (lambda c: c.position_bias is None, "it has no position_bias"),
    (lambda c: c.grad_lse is None, "its backward takes no gradient of the logsumexp"),
    (lambda c: c.dropout_p == 0, "its dropout draws another mask than every other backend's"),
    (lambda c: c.rows_by_image is None, "readers of an image do not stand together"),
    (lambda c: c.v.shape[-1] == c.k.shape[-1], "the head dimension of v is not that of k"),
    (lambda c: c.q.shape[-1] % 8 == 0, "its head dimensions are multiples of 8"),
    (lambda c: c.q.shape[-1] <= 256, "its head dimensions end at 256"),
    (lambda c: c.q.numel() > 0 and c.k.numel() > 0, "nothing to compute"),
    (
        lambda c: max(map(span, (c.q, c.k, c.v))) <= MOST_ELEMENTS,
        "its offsets are 32 bits wide: 2^31 elements and more make it fault",
    ),
    (
        lambda c: all(aligned(x) for x in (c.q, c.k, c.v)),
        "rows that do not start at multiples of 16 bytes, as its loads want",
    ),
    (
        lambda c: c.q.device.type != "cuda" or _capability(c.q.device.index) >= OLDEST_CAPABILITY,
        "a GPU older than compute capability 8.0",
    ),
    (lambda c: c.max_readers >= FEWEST_ROWS, f"fewer than {FEWEST_ROWS} rows read an image"),
]


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'fastvlm[flash]')"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        version = importlib.import_module("flash_attn").__version__
        _interface()
    except Exception as error:
        return f"flash_attn cannot be imported: {type(error).__name__}: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"flash-attn {version} is too old: {'.'.join(map(str, OLDEST))} or newer"
    return None


@functools.cache
def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _reason(call: Call) -> str | None:
    return next((why for holds, why in RULES if not holds(call)), None)


def _settings(
    reader_offsets: Tensor, kv_offsets: Tensor, max_readers: int, max_kv: int, causal: bool,
    window: int, scale: float, softcap: float, window_after: int,
) -> dict[str, Any]:  # fmt: skip
    """The keyword arguments that forward and backward share."""
    left = window - 1 if window > 0 else -1
    right = window_after - 1 if window_after > 0 else left
    return {
        "cu_seqlens_q": reader_offsets,
        "cu_seqlens_k": kv_offsets,
        "max_seqlen_q": max_readers,
        "max_seqlen_k": max_kv,
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": 0 if causal else right,
        "softcap": softcap,
        "alibi_slopes": None,
    }


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, image_of: Tensor,
    rows_by_image: Tensor | None, reader_offsets: Tensor, seed: Tensor | None, max_q: int,
    max_kv: int, max_readers: int, causal: bool, window: int, scale: float, softcap: float,
    dropout_p: float, position_bias: None = None, window_after: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    settings = _settings(
        reader_offsets, kv_offsets, max_readers, max_kv, causal, window, scale, softcap,
        window_after,
    )  # fmt: skip
    out, lse, *_ = _interface()._flash_attn_varlen_forward(q, k, v, **settings)
    # [H, Tq]; +inf where a row sees nothing
    none = lse.isposinf()
    largest = (lse * _LOG2E).masked_fill(none, float("-inf"))
    return out, torch.stack((largest, (~none).to(lse.dtype)), -1).transpose(0, 1).contiguous()


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor,
    q_offsets: Tensor, kv_offsets: Tensor, image_of: Tensor, rows_by_image: Tensor | None,
    reader_offsets: Tensor, seed: Tensor | None, max_q: int, max_kv: int, max_readers: int,
    causal: bool, window: int, scale: float, softcap: float, dropout_p: float, needs: list[bool],
    position_bias: None = None, need_bias: bool = False, window_after: int = 0,
    grad_lse: None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    settings = _settings(
        reader_offsets, kv_offsets, max_readers, max_kv, causal, window, scale, softcap,
        window_after,
    )  # fmt: skip
    largest, total = stats.unbind(-1)
    lse = (largest / _LOG2E + total.log()).masked_fill(total == 0, float("inf"))
    if not aligned(grad_out):
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    _interface()._flash_attn_varlen_backward(
        grad_out, q, k, v, out, lse.t().contiguous(), *grads, **settings, deterministic=True
    )
    found = (g if need else g.new_empty(0) for g, need in zip(grads, needs))
    return *found, q.new_empty(0)


def _kernel(run: Callable[..., Any], first: int, where: int) -> Kernel:
    """first: the place of q in the schema; where: that of rows_by_image."""

    def unsupported(*args: Any) -> str | None:
        q, k, v = args[first : first + 3]
        dropout_p = args[where + 10]
        # behind the numbers, and what is wanted of a backward; left out where there are none
        behind = [*args[where + 11 + min(first, 1) :], *[None] * 4]
        return _reason(
            Call(
                *(q, k, v, args[where], args[where + 5], dropout_p),
                *(behind[0], behind[3] if first else None),
            )
        )

    return Kernel("flash", run, unavailable, unsupported, calls="what fastvlm/flash.py lists")


for _name in ("cross_attention", "self_attention"):
    register(_name, _kernel(_forward, 0, 6))
    register(f"{_name}_backward", _kernel(_backward, 1, 9))
