"""What the machine code of a kernel depends on in this package, as one short digest."""

from __future__ import annotations

import ast
import functools
import hashlib
from typing import Any

from triton.language import constexpr
from triton.runtime.jit import JITFunction


@functools.cache
def digest(kernel: Any) -> str:
    """Of the code of a kernel, of the functions that it calls and of the constants it names.

    Comments, docstrings and places in a file do not count. What is of Triton itself does not
    either: a results file names its version, and counts of two versions are never put together.
    """
    found: dict[str, str] = {}
    _gather(kernel, found)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


def _gather(kernel: Any, found: dict[str, str]) -> None:
    name = f"{kernel.__module__}.{kernel.__qualname__}"
    if name in found:
        return
    tree = kernel.parse()
    body = tree.body[0].body
    if ast.get_docstring(tree.body[0]) is not None:
        del body[0]
    found[name] = ast.dump(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used = kernel.__globals__.get(node.id)
            if isinstance(used, JITFunction) and used.__module__.startswith("fastvlm."):
                _gather(used, found)
            elif isinstance(used, (constexpr, int, float, str)):
                found[f"{name}: {node.id}"] = repr(used)
