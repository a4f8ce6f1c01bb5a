"""The numbers of an attention module, as its spec names them."""

from __future__ import annotations

from typing import Any

import torch

from fastvlm.compat import hf
from fastvlm.models.spec import Attention

_SDPA_LEAVES_OUT_SOFTCAP = hf.sdpa_leaves_out_softcap()


def softcap_of(module: Any, spec: Attention) -> float | None:
    """The cap on the scores of an attention module, where transformers computes it."""
    cap: float | None = None if spec.softcap is None else getattr(module, spec.softcap)
    return None if cap is None or _leaves_out_softcap(module) else cap


def window_of(module: Any, spec: Attention) -> int | None:
    """The positions that a row sees, its own included; None: all."""
    window: int | None = None if spec.window is None else getattr(module, spec.window)
    if window is not None and not module.is_causal:
        window += 1  # transformers' bidirectional window includes its far end
    return window


def _leaves_out_softcap(module: Any) -> bool:
    return _SDPA_LEAVES_OUT_SOFTCAP and hf.attention_of(module.config) == "sdpa"


def left_out_softcaps(model: torch.nn.Module) -> list[str]:
    """What a reader of the report should know of attention whose config has a cap in vain."""
    capped = (m for m in model.modules() if getattr(m, "attn_logit_softcapping", None) is not None)
    if not any(map(_leaves_out_softcap, capped)):
        return []
    return [
        "transformers' sdpa leaves out attn_logit_softcapping, and so does fastvlm then: "
        "model.set_attn_implementation('eager') computes with it"
    ]
