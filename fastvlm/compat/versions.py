"""The versions that fastvlm is tested on, and what is said or refused outside of them."""

from __future__ import annotations

import importlib.metadata
import re
from functools import cache

Version = tuple[int, ...]

# oldest and newest minor of each library that the tests have passed on
TESTED: dict[str, tuple[Version, Version]] = {
    "transformers": ((5, 0), (5, 24)),
    "torch": ((2, 13), (2, 13)),
}
# the oldest transformers in which linear layers, MLPs and norms are patched at all
OLDEST_TRANSFORMERS: Version = (4, 48, 1)


def parsed(version: str) -> Version:
    """The numbers at the head of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    head = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in head[0].split(".")) if head else ()


@cache
def installed(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def attention_refused() -> str | None:
    """Why attention and its caches stay with transformers here; None where they need not."""
    version = installed("transformers")
    if version is None or parsed(version) >= (5,):
        return None
    return f"attention and its caches need transformers 5, here is {version}"


def without_transformers_5(what: str) -> str | None:
    """Why a part of fastvlm, named what, cannot be imported here; None where it can."""
    version = installed("transformers")
    if version is None or parsed(version) >= (5,):
        return None
    return f"{what} needs transformers 5, here is {version}"
