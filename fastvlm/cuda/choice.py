"""When a kernel of the CUDA library is preferred to Triton's, where both could serve a call.

The one place that decides it. Nothing has been measured yet: what stands here follows from what the
kernels do, and each row is to be replaced by what `make gpu-check` shows on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """prefers(*args of the schema): whether the CUDA kernel comes before Triton's.

    calls: which calls those are, in the words of ``python -m fastvlm env``; "" for none.
    """

    prefers: Callable[..., bool]
    reason: str
    calls: str


# of what the kernel takes at all, which is a decoding step's: see unsupported() of its launcher.
# Float32 is left to Triton on purpose: these kernels are made of 16-bit products of the tensor
# cores, whose only other precision is TF32. Exact products need other kernels, without tensor
# cores, for a dtype in which nobody decodes on a GPU for speed
ALWAYS = Rule(
    lambda *args: True,
    "a decoding step: small, often, and bound by how fast K/V and weights stream",
    "few rows, bfloat16 and float16",
)
# as many rows as four tiles of a tensor core instruction
FEW_ROWS = 64
NEVER = Rule(lambda *args: False, "Triton's kernel does the same work with the same loads", "")

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "cross_attention",
            "cached_attention",
            "geglu_mlp",
            "gelu_mlp",
            "low_precision_linear",
            "low_precision_hidden",
            "linear_topk",
        ),
        ALWAYS,
    ),
    # a decoding step has few rows: a launch through Triton's Python costs more than the kernel
    **dict.fromkeys(
        ("rms_norm", "residual_rms_norm", "residual_layer_norm"),
        Rule(
            lambda x, *rest: x.shape[0] <= FEW_ROWS,
            "few rows: the cost of a call counts most",
            f"up to {FEW_ROWS} rows",
        ),
    ),
    **dict.fromkeys(
        (
            "rms_norm_backward",
            "residual_rms_norm_backward",
            "residual_layer_norm_backward",
        ),
        NEVER,
    ),
}


def yields(op: str, args: tuple[Any, ...]) -> str | None:
    """Why another backend that can serve this call should; None where ours comes first."""
    rule = RULES[op]
    return None if rule.prefers(*args) else rule.reason
