"""Weights move to huge pages in place, and only where they are the process's own memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

import fastvlm
from fastvlm.cpu import pages

BIG = 2**22  # elements of float32: several huge pages, wherever they begin

_kernel = re.match(r"(\d+)\.(\d+)", platform.release())
_collapses = _kernel is not None and tuple(map(int, _kernel.groups())) >= (6, 1)
needs_pages = pytest.mark.skipif(
    pages.refused() is not None or not _collapses,
    reason=pages.refused() or "needs MADV_COLLAPSE, of Linux 6.1",
)


def huge_bytes_at(tensor: Tensor) -> int:
    """What lies on huge pages, by the kernel's account, of the mapping that holds a tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(address, 16) for address in found.groups())
            inside = start <= tensor.data_ptr() < end
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


@needs_pages
def test_a_tensor_moves_in_place() -> None:
    x = torch.randn(BIG)
    address, before = x.data_ptr(), x.clone()
    moved = pages.gather([x])
    assert x.nbytes // 2 <= moved <= x.nbytes
    assert huge_bytes_at(x) >= moved
    assert x.data_ptr() == address
    assert torch.equal(x, before)
    assert pages.gather([x]) == moved  # a second time changes nothing


@needs_pages
def test_neighbours_share_a_page() -> None:
    whole = torch.randn(BIG)
    parts = whole.numpy()[: BIG // 2], whole.numpy()[BIG // 2 :]
    assert pages.gather(map(torch.from_numpy, parts)) == pages.gather([whole])


def test_a_variable_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pages.VARIABLE, "0")
    assert "FASTVLM_HUGE_PAGES=0" in str(pages.refused())
    assert pages.gather([torch.randn(BIG)]) == 0


def test_files_and_shared_memory_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(4 * BIG))
    mapped = torch.from_file(str(path), shared=False, size=BIG)
    shared = torch.randn(BIG).share_memory_()
    assert pages.gather([mapped, shared]) == 0


def test_other_kinds_of_tensors_are_left_alone() -> None:
    sparse = torch.eye(8).to_sparse()
    assert pages.gather([torch.empty(BIG, device="meta"), sparse, torch.empty(0)]) == 0


@needs_pages
@pytest.mark.parametrize("weights", [None, "bf16"])
def test_a_patch_says_what_lies_on_huge_pages(weights: str | None) -> None:
    model = models.bart(vocab_size=BIG // 32)  # of the weights the head's alone is large
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    report = fastvlm.patch(model, weights=weights)
    if weights is not None:  # the step reads a copy
        assert report.huge_bytes == 0
        return
    assert head.nbytes // 2 <= report.huge_bytes <= huge_bytes_at(head)
    assert f"{report.huge_bytes / 2**20:.0f} MiB" in str(report)
