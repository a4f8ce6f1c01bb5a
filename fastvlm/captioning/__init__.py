"""Folders, shards and streams of pictures: `Captioner`, and ``python -m fastvlm caption``.

Nothing heavy is imported here: the command line must print its help without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm.captioning.answers import Answer
    from fastvlm.captioning.captioner import Captioner

__all__ = ["Answer", "Captioner"]

_HOME = {"Answer": "answers", "Captioner": "captioner"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastvlm.captioning' has no attribute {name!r}")
    return getattr(import_module(f"fastvlm.captioning.{_HOME[name]}"), name)
