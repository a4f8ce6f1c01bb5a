"""transformers' own attention, for what the ops do not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.attention_interface.call import Call, lower
from fastvlm.checks import describe
from fastvlm.compat import attentions, hf, pytorch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what only a model's own eager attention and, of a position bias, sdpa know
_MORE_THAN_THE_OPS = ("position_bias", "s_aux", "sinks")


def is_served(call: Call) -> bool:
    """Whether the ops compute what this module's attention means by its arguments."""
    q, k, v, more = call.q, call.k, call.v, call.more
    if torch.compiler.is_compiling():
        return False  # a graph cannot wait for what a mask says
    plain = all(type(x) is Tensor for x in (q, k, v))  # no DTensor, no fake one
    if not plain or pytorch.is_transformed() or torch.jit.is_tracing():
        return False
    if any(more.get(name) is not None for name in _MORE_THAN_THE_OPS) or _has_sinks(call):
        return False
    if more.get("output_attentions") or hf.is_paged(more.get("cache")):
        return False
    if not attentions.has_sdpa(call.module) and ("softcap" not in more or call.causal()):
        return False  # only its own eager attention is known to be right
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in _DTYPES
        and q.device == k.device == v.device
        and q.device.type in ("cpu", "cuda")
        and q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and min(*q.shape, *k.shape) > 0
        and q.shape[1] % k.shape[1] == 0
    )


def _has_sinks(call: Call) -> bool:
    return getattr(call.module, "sinks", None) is not None


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """sdpa; or the eager attention of the module's file where sdpa lacks something, or where the
    probabilities are asked for. -> ([B, Q, H, D], probabilities or None)."""
    call = call.with_packing_in_mask()
    more = {**call.more, "dropout": call.dropout, "scaling": call.scaling}
    if call.is_causal is not None:
        more["is_causal"] = call.is_causal
    eager, sdpa = attentions.eager_attention(call.module), attentions.has_sdpa(call.module)
    lacking = not sdpa or call.softcap is not None or _has_sinks(call)
    lacking = lacking or more.get("s_aux") is not None
    wants = bool(more.get("output_attentions")) and eager is not None
    if not lacking and not wants:
        more.pop("softcap", None)
        out = attentions.attention_function("sdpa")(
            call.module, call.q, call.k, call.v, call.mask, **more
        )
        return out[0], None
    if eager is None:
        raise ValueError(
            f"fastvlm: {type(call.module).__name__} asks for attention that sdpa does not have "
            f"(softcap: {describe(call.softcap)}), and its file has no eager attention: "
            "set another attn_implementation"
        )
    return _eager(eager, call, more, as_sdpa=sdpa or "softcap" in call.more)


def _eager(
    eager: Any, call: Call, more: dict[str, Any], as_sdpa: bool
) -> tuple[Tensor, Tensor | None]:
    """as_sdpa: a mask that is not there may mean a causal one, and a row that a boolean mask lets
    see nothing gives zeros; without, both are as the file's own attention has them."""
    mask, none = call.mask, None
    if mask is None and as_sdpa and attentions.has_sdpa(call.module) and call.causal():
        mask = lower(call)
    if mask is not None and mask.dtype == torch.bool:
        none = ~mask.any(-1).transpose(1, 2).unsqueeze(-1)
        # the softmax is of float32, for which the least of float64 is infinite
        least = max(torch.finfo(call.q.dtype).min, torch.finfo(torch.float32).min)
        hidden = torch.full((), least, dtype=call.q.dtype, device=mask.device)
        mask = torch.where(mask, torch.zeros_like(hidden), hidden)
    out, weights = eager(call.module, call.q, call.k, call.v, mask, **more)
    if none is not None and as_sdpa:
        out = out.masked_fill(none, 0)
    return out, weights if more.get("output_attentions") else None
