"""Decoding: caches that hold one copy of an image's keys and values for all its readers.

`encode_once` and `Encoded` are imported when first used: the caches must not need a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm.decoding.encode import Encoded, encode_once

__all__ = ["Encoded", "encode_once"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastvlm.decoding' has no attribute {name!r}")
    return getattr(import_module("fastvlm.decoding.encode"), name)
