"""Whether an attention says of itself what the masks of its stack say.

A stack of transformers makes its masks by its configuration, and its attentions mostly do as they
are masked. Ours are told by their own attributes. Where somebody has changed one of the two, or put
a layer in another place, transformers' own attention runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastvlm.models.spec import Stack

_OF_ATTENTION = ("is_causal", "sliding_window", "layer_type")


def said(stack: Any, attentions: Iterable[Any]) -> tuple[Any, ...]:
    """All that `disagreed` looks at, to be compared. attentions: a `Part` each."""
    config = stack.config
    kinds = getattr(config, "layer_types", None)
    own = tuple(
        getattr(part.module, name, None)
        for part in attentions
        if part.which == 0
        for name in _OF_ATTENTION
    )
    whole = None if kinds is None else tuple(kinds)
    return (*own, whole, getattr(config, "sliding_window", None))


def disagreed(stack: Any, spec: Stack, attentions: Iterable[Any]) -> str | None:
    """The first attention of its own rows whose masks say something else; None without."""
    config = stack.config
    kinds = getattr(config, "layer_types", None) if spec.masks else None
    for path, module, layer, which in attentions:
        if which != 0:
            continue
        causal = getattr(module, "is_causal", None)
        if causal is not None and not spec.merged and bool(causal) != spec.decodes:
            return f"its {path} says is_causal = {causal}, and its stack makes other masks"
        if kinds is None or not hasattr(module, "sliding_window"):
            continue
        kind = kinds[layer] if layer < len(kinds) else None
        window = config.sliding_window if kind == "sliding_attention" else None
        if module.sliding_window != window or getattr(module, "layer_type", kind) != kind:
            return f"its {path} has another window than its configuration gives it"
    return None
