"""The versions that fastvlm is tested on, and what is said or refused outside of them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import cache

Version = tuple[int, ...]

# Oldest and newest minor that the tests have passed on (CONTRIBUTING.md, Versions).
TESTED: dict[str, tuple[Version, Version]] = {
    "transformers": ((5, 5), (5, 24)),
    "torch": ((2, 10), (2, 14)),
    "python": ((3, 10), (3, 13)),
}
# Attention, its caches and decoding: to 5.4 layers get `cache_position`, BART's give tuples and
# hand nothing down to their attention, and Gemma-2's stack scales its embeddings itself.
OLDEST_ATTENTION: Version = TESTED["transformers"][0]
TESTED_NAMES = "transformers 5.5 to 5.24"


def parsed(version: str) -> Version:
    """The numbers at the head of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    head = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in head[0].split(".")) if head else ()


@cache
def installed(package: str) -> str | None:
    """The version of an installed package, or of Python; None where there is none."""
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_tested(package: str) -> bool:
    """Whether the installed version lies in the range that the tests have passed on."""
    oldest, newest = TESTED[package]
    version = parsed(installed(package) or "")
    return oldest <= version[:2] <= newest


def attention_refused() -> str | None:
    """Why attention and its caches stay with transformers here; None where they need not."""
    return needs_newer_transformers("attention and its caches")


def needs_newer_transformers(what: str) -> str | None:
    """Why a part of fastvlm, named what, does not work beside this transformers; None: it does."""
    version = installed("transformers")
    if version is None or parsed(version) >= OLDEST_ATTENTION:
        return None
    verb = "need" if " and " in what else "needs"
    return f"{what} {verb} transformers {_text(OLDEST_ATTENTION)} or newer, here is {version}"


def gpt2_hides_states() -> bool:
    """Whether GPT-2 looks at a mask of the states that it reads (to 5.16 it forgets it)."""
    return parsed(installed("transformers") or "") >= (5, 17)


def cross_cache_has_window() -> bool:
    """Whether transformers' cache keeps of an encoder's states what a sliding window holds, in the
    layers of a decoder whose own attention has one (to 5.9)."""
    return parsed(installed("transformers") or "") < (5, 10)


def outside() -> list[str]:
    """What is installed here in a version that fastvlm is not tested on, and what follows."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        version = installed(package)
        minor = parsed(version or "")[:2]
        if not minor or oldest <= minor <= newest:
            continue
        tested = _text(oldest) if oldest == newest else f"{_text(oldest)} to {_text(newest)}"
        fact = f"{package} {version} is not among the versions tested ({tested})"
        if package == "transformers" and minor < oldest:
            fact += ": attention, its caches and decoding are left to transformers"
        elif package == "transformers":
            fact += ": compare a patched model's outputs with its own before you rely on them"
        found.append(fact)
    return found


def _text(version: Version) -> str:
    return ".".join(map(str, version))
