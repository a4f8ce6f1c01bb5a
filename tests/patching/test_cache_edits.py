"""Keys and values of a cache that are written into by hand between two steps."""

from __future__ import annotations

import copy
import io
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from llama_models import mllama
from models import FAMILIES
from test_cache_rows import CHANGES, ENCODERS, assert_steps, steps
from test_mllama import PICTURES, inputs_of
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

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


def copied(way: str) -> Any:
    """Half of all image values, in a cache that is then copied or saved."""

    def act(cache: Any) -> Any:
        for layer in cache.cross_attention_cache.layers:
            layer.values.mul_(0.5)
        if way == "deepcopy":
            return copy.deepcopy(cache)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return act, unchanged


def uncounted(way: str) -> Any:
    """A write that no tensor counts."""

    def act(cache: Any) -> None:
        for layer in cache.cross_attention_cache.layers:
            if way == "data":
                layer.values.data.mul_(0.5)
            else:
                layer.values.numpy()[:] *= 0.5

    return act, unchanged


MORE = {**{way: copied(way) for way in ("deepcopy", "save")},
        **{way: uncounted(way) for way in ("data", "numpy")}}  # fmt: skip


@pytest.mark.parametrize("way", MORE)
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_however_it_was_written_and_copied(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES[name].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    monkeypatch.setitem(CHANGES, way, MORE[way])
    assert_steps(ours, model, name, ["swap", way, "nothing"])


def test_own_values_of_a_copied_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as they are without a copy."""
    model = FAMILIES["bart"].build()
    fastvlm.patch(model)

    def act(cache: Any) -> Any:
        cache.self_attention_cache.layers[1].values.mul_(0.5)
        return copy.deepcopy(cache)

    monkeypatch.setitem(CHANGES, "copied", (act, unchanged))
    with pytest.raises(NotImplementedError, match="values of a cache whose beams have changed"):
        steps(model, "bart", ["swap", "copied"])


@pytest.mark.parametrize("reads", [torch.inference_mode, torch.no_grad])
def test_keys_that_were_only_looked_at(reads: Any) -> None:
    """In one mode, and the step in another; and a cache that is cropped after it."""
    model = FAMILIES["bart"].build()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    found = []
    for each in (model, ours):
        inputs = FAMILIES["bart"].inputs(each)
        with reads():
            out = each(**inputs, decoder_input_ids=torch.full((3, 4), 7), use_cache=True)
            cache, states = out.past_key_values, out.encoder_last_hidden_state
            cache.reorder_cache(torch.tensor([1, 0, 2]))
            for part in (cache.cross_attention_cache, cache.self_attention_cache):
                assert all(layer.values.sum() != 0 for layer in part.layers)
            cache.crop(-2)
            assert {layer.keys.shape[2] for layer in cache.self_attention_cache.layers} == {2}
        order = torch.tensor([1, 0, 2])
        with torch.no_grad():
            step = each(
                encoder_outputs=BaseModelOutput(states[order]), past_key_values=cache,
                attention_mask=inputs["attention_mask"][order], use_cache=True,
                decoder_input_ids=torch.full((3, 1), 9),
            )  # fmt: skip
        found.append(step.logits)
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]], ids=["view", "copy"])
@pytest.mark.parametrize("pictures", ["of all tiles", "of some"])
def test_pictures_between_layers_of_text(pictures: str, order: list[int]) -> None:
    """Steps read the keys that all rows see, a copy where some see fewer."""
    model: Any = mllama()
    ours = copy.deepcopy(model)
    fastvlm.patch(ours)
    found = [_written_over(each, PICTURES[pictures], order) for each in (model, ours)]
    for got, want in zip(*found):
        assert torch.allclose(got, want, atol=1e-4)
    unwritten = _written_over(ours, PICTURES[pictures], order, by=1.0)
    assert (unwritten[-1] - found[1][-1]).abs().max() > 0.1


def _written_over(
    model: Any, tiles: list[list[int]], order: list[int], by: float = 0.2
) -> list[Tensor]:
    """Logits of a prefill and three steps, before the last of which values are written."""
    index, inputs, found = torch.tensor(order), inputs_of(tiles), []
    mask, tiled = inputs["attention_mask"], inputs["cross_attention_mask"]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = out.past_key_values
        cache.reorder_cache(index)
        mask, tiled = mask[index], tiled[index]
        for token in (20, 21, 22):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            tiled = torch.cat([tiled, tiled[:, -1:]], 1)
            if token == 22:
                cache.layers[1].values.mul_(by)
            step = model(
                input_ids=torch.full((3, 1), token), attention_mask=mask, past_key_values=cache,
                cross_attention_mask=tiled, use_cache=True,
            )  # fmt: skip
            found.append(step.logits)
    return found


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
    assert not readers.handed._copies
    layer = caches[0].cross_attention_cache.layers[0]
    seen = weakref.ref(layer)
    assert layer.keys is not None
    assert readers.handed._copies
    assert not copy.deepcopy(readers).handed._copies
    del layer, readers
    caches.clear()
    assert seen() is None  # at once: nothing that it handed out goes round in a circle
