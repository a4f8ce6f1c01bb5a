"""Huge pages for the weights that a decoding step streams from memory (Linux).

A step reads hundreds of megabytes once. In pages of 4 KiB the addresses of each have to be looked
up anew, on a virtual machine in two tables. `gather` asks the kernel to move what lies there to
huge pages: in place, with the same addresses and contents.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

VARIABLE = "FASTVLM_HUGE_PAGES"
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPPINGS = Path("/proc/self/maps")
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1
# what an allocator may put between two tensors that lie side by side
_GAP = 8192

Span = tuple[int, int]  # addresses: the first, and the one behind the last


def refused() -> str | None:
    """Why nothing is moved; None where it may be."""
    if os.environ.get(VARIABLE) == "0":
        return f"refused by {VARIABLE}=0"
    if not sys.platform.startswith("linux") or not _SETTINGS.exists():
        return "no transparent huge pages here"
    if "[never]" in (_SETTINGS / "enabled").read_text():
        return f"{_SETTINGS / 'enabled'} says never"
    return None


def gather(tensors: Iterable[Tensor]) -> int:
    """Move the memory of CPU tensors to huge pages; the bytes that lie on such now.

    Memory that maps a file or is shared is left alone, and so is what fills no whole page. What the
    kernel refuses stays as it is.
    """
    if refused() is not None:
        return 0
    spans = _spans(tensors)
    if not spans:
        return 0
    size = int((_SETTINGS / "hpage_pmd_size").read_text())
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, end in _within(spans, _private()):
        for page in range(-(-start // size) * size, end // size * size, size):
            if advise(page, size, _COLLAPSE) == 0:
                moved += size
    return moved


def _spans(tensors: Iterable[Tensor]) -> list[Span]:
    """Where tensors lie, in order; neighbours are one span."""
    found = []
    for tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    merged: list[Span] = []
    for start, end in sorted(set(found)):
        if merged and start <= merged[-1][1] + _GAP:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


def _private() -> list[Span]:
    """The mappings of this process that are neither of a file nor shared, in order."""
    found: list[Span] = []
    for line in _MAPPINGS.read_text().splitlines():
        addresses, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        if inode == "0" and permissions.startswith("rw") and permissions.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


def _within(spans: list[Span], mappings: list[Span]) -> list[Span]:
    """The parts of spans that lie in one of the mappings."""
    parts = ((max(a, c), min(b, d)) for a, b in spans for c, d in mappings)
    return [(start, end) for start, end in parts if start < end]
