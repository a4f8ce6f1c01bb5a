"""The reference workload: the Florenz models of arXiv 2503.09443, their data, and a small world.

The models need transformers 5.5; `fastvlm.florenz.data` and `fastvlm.florenz.world` do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm.florenz.config import FlorenzConfig
    from fastvlm.florenz.freezing import freeze_as_published, parameter_counts
    from fastvlm.florenz.model import FlorenzForConditionalGeneration, FlorenzModel
    from fastvlm.florenz.parts import from_pretrained_parts
    from fastvlm.florenz.vocabulary import remapped_embedding

__all__ = [
    "FlorenzConfig",
    "FlorenzForConditionalGeneration",
    "FlorenzModel",
    "freeze_as_published",
    "from_pretrained_parts",
    "parameter_counts",
    "remapped_embedding",
]

_HOME = {
    "FlorenzConfig": "config",
    **dict.fromkeys(("freeze_as_published", "parameter_counts"), "freezing"),
    **dict.fromkeys(("FlorenzForConditionalGeneration", "FlorenzModel"), "model"),
    "from_pretrained_parts": "parts",
    "remapped_embedding": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastvlm.florenz' has no attribute {name!r}")

    from fastvlm.compat.versions import needs_newer_transformers

    if why := needs_newer_transformers(f"fastvlm.florenz.{name}"):
        raise ImportError(why)
    value = globals()[name] = getattr(import_module(f"fastvlm.florenz.{_HOME[name]}"), name)
    return value
