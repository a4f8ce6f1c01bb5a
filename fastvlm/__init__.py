"""fastvlm: fused kernels for encoder-decoder vision-language models.

Names are imported when they are first used, so that ``python -m fastvlm env`` can say what is wrong
where a part of the package cannot be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm import nn, ops
    from fastvlm.attention_interface.register import register_attention, unregister_attention
    from fastvlm.captioning.captioner import Captioner
    from fastvlm.checking.check import check
    from fastvlm.checking.result import Check
    from fastvlm.decoding.caption import Caption, caption
    from fastvlm.features.kept import VisionFeatures
    from fastvlm.layout import Layout
    from fastvlm.loading.errors import LoadError
    from fastvlm.loading.load import Loaded, load
    from fastvlm.loading.save import save_published
    from fastvlm.ops.dispatch import use
    from fastvlm.patching.log_probs import log_prob_change
    from fastvlm.patching.patch import PatchError, patch, patched, unpatch

__version__ = "0.2.0"

__all__ = [
    "Caption",
    "Captioner",
    "Check",
    "Layout",
    "LoadError",
    "Loaded",
    "PatchError",
    "VisionFeatures",
    "caption",
    "check",
    "load",
    "log_prob_change",
    "nn",
    "ops",
    "patch",
    "patched",
    "register_attention",
    "save_published",
    "unpatch",
    "unregister_attention",
    "use",
]

_HOME = {
    **dict.fromkeys(("Caption", "caption"), "fastvlm.decoding.caption"),
    "Captioner": "fastvlm.captioning.captioner",
    "Check": "fastvlm.checking.result",
    "check": "fastvlm.checking.check",
    "Layout": "fastvlm.layout",
    "VisionFeatures": "fastvlm.features.kept",
    "LoadError": "fastvlm.loading.errors",
    **dict.fromkeys(("Loaded", "load"), "fastvlm.loading.load"),
    "save_published": "fastvlm.loading.save",
    "use": "fastvlm.ops.dispatch",
    "log_prob_change": "fastvlm.patching.log_probs",
    **dict.fromkeys(("PatchError", "patch", "patched", "unpatch"), "fastvlm.patching.patch"),
    **dict.fromkeys(
        ("register_attention", "unregister_attention"), "fastvlm.attention_interface.register"
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("nn", "ops"):
        return import_module(f"fastvlm.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastvlm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
