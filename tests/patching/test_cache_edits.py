"""Keys and values of a cache that are written into by hand between two steps."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import FAMILIES
from test_cache_rows import CHANGES, ENCODERS, assert_steps, steps
from torch import Tensor

import fastvlm


def unchanged(x: Tensor) -> Tensor:
    return x


def scaled(which: str, name: str) -> Any:
    """Of every layer, each row by another factor."""

    def act(cache: Any) -> None:
        for layer in getattr(cache, which).layers:
            x = getattr(layer, name)
            x *= torch.linspace(0.5, 1.5, x.shape[0]).view(-1, 1, 1, 1)

    return act, unchanged


def halved(which: str, name: str, row: Any = slice(None)) -> Any:
    def act(cache: Any) -> None:
        for layer in getattr(cache, which).layers:
            getattr(layer, name)[row] *= 0.5

    return act, unchanged


CROSS, SELF = "cross_attention_cache", "self_attention_cache"
EDITS = {
    "keys": scaled(CROSS, "keys"),
    "values": scaled(CROSS, "values"),
    "halved": halved(CROSS, "values"),
    "one-row": halved(CROSS, "values", 4),
    "own-keys": scaled(SELF, "keys"),
    "nothing": (lambda cache: [layer.keys.sum() for layer in cache.cross_attention_cache.layers],
                unchanged),
    "own-nothing": (lambda cache: [layer.keys.sum() for layer in cache.self_attention_cache.layers],
                    unchanged),
}  # fmt: skip


@pytest.fixture(autouse=True)
def edits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, edit in EDITS.items():
        monkeypatch.setitem(CHANGES, name, edit)


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("changes", [
    ["keys", "same"], ["values", "keys"], ["swap", "keys", "values"], ["keys", "swap"],
    ["repeat", "halved", "halved"], ["select", "values"], ["own-keys", "keys"],
    ["swap", "nothing", "own-nothing", "swap"],
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("name", ENCODERS)
def test_the_next_step_reads_what_was_written(
    name: str, changes: list[str], padded: bool, inference: bool
) -> None:
    model = FAMILIES[name].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    with torch.inference_mode() if inference else nullcontext():
        assert_steps(ours, model, name, changes, padded)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_row_with_values_of_its_own_of_an_image_that_others_read(name: str, padded: bool) -> None:
    model = FAMILIES[name].build()
    fastvlm.patch(model)
    with pytest.raises(ValueError, match="values of rows that read the same image must stay"):
        steps(model, name, ["repeat", "one-row"], padded)


@pytest.mark.parametrize("name", ENCODERS)
def test_own_keys_of_rows_that_changed_places(name: str) -> None:
    model = FAMILIES[name].build()
    fastvlm.patch(model)
    with pytest.raises(NotImplementedError, match="keys of a cache whose beams have changed"):
        steps(model, name, ["swap", "own-keys"])


def test_a_copy_that_is_written_into_later() -> None:
    """Kept over a step that reads the cache, and given again meanwhile."""
    model = FAMILIES["bart"].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    kept: list[Tensor] = []

    def keep(cache: Any) -> None:
        kept.append(cache.cross_attention_cache.layers[0].keys)

    def write(cache: Any) -> None:
        assert cache.cross_attention_cache.layers[0].keys is kept[-1]
        kept[-1].mul_(0.5)

    CHANGES["keep"], CHANGES["write"] = (keep, unchanged), (write, unchanged)
    try:
        assert_steps(ours, model, "bart", ["keep", "nothing", "write", "nothing"])
    finally:
        del CHANGES["keep"], CHANGES["write"]


def test_copies_are_let_go_of() -> None:
    """A step keeps none of those that nobody holds; a saved cache has none."""
    model = FAMILIES["bart"].build()
    fastvlm.patch(model)
    caches: list[Any] = []
    CHANGES["keep"] = ((lambda cache: caches.append(cache)), unchanged)
    try:
        steps(model, "bart", ["keep", "nothing", "same", "same"])
    finally:
        del CHANGES["keep"]
    readers = caches[0].cross_attention_cache.layers[0].readers
    assert not readers.handed
    assert caches[0].cross_attention_cache.layers[0].keys is not None
    assert readers.handed
    assert not copy.deepcopy(readers).handed
