"""A cache that generate() fills is allocated once, for the tokens that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
from models import FAMILIES
from test_families import generate
from test_steps import PLANNED, patched
from torch import nn

import fastvlm
from fastvlm.decoding import rows
from fastvlm.decoding.prefixes import decoder_stack


def addresses(model: nn.Module, inputs: dict[str, Any], **wish: Any) -> tuple[Any, Any]:
    """generate()'s output, and where caches and table lay at each of its steps."""
    seen: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cache = output.past_key_values
        own = getattr(cache, "self_attention_cache", cache)
        tensors = [t for layer in own.layers for t in (layer.k, layer.v)]
        seen.append(tuple(t.data_ptr() for t in [*tensors, own.layers[0].rows.table]))

    handle = decoder_stack(model).register_forward_hook(note, with_kwargs=True)
    try:
        return generate(model, inputs, return_dict_in_generate=True, **wish), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PLANNED)
def test_generate_allocates_its_caches_once(name: str, beams: int) -> None:
    model, inputs = patched(name)
    steps = rows.ROOM + 46
    wish = {"num_beams": beams, "max_new_tokens": steps, "min_new_tokens": steps}
    output, seen = addresses(model, inputs, **wish)
    assert len(seen) == steps
    assert len(set(seen)) == 1
    if name == "whisper":
        return  # its generate() takes apart what it returns
    own = output.past_key_values
    own = getattr(own, "self_attention_cache", own)
    # the last token is in no cache; nothing is there beyond the others
    assert own.layers[0].k.shape[1] == output.sequences.shape[1] - 1 == own.get_seq_length()


def test_room_for_a_limit_that_nobody_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = patched("bart")
    monkeypatch.setattr(rows, "MOST_ROOM", 7)
    wish = {"max_new_tokens": 100, "min_new_tokens": 20, "eos_token_id": [*range(3, 99)]}
    output, seen = addresses(model, inputs, **wish)
    capacity = output.past_key_values.self_attention_cache.layers[0].k.shape[1]
    assert len(seen) == 21
    assert capacity == 32  # after 8 and 16
    assert len(set(seen)) == 3


@pytest.mark.parametrize("only", ["attention", "loss"])
def test_room_in_a_model_that_is_patched_in_part(only: str) -> None:
    """Told by whichever part of the model's class is there; transformers' own cache has no use."""
    model = FAMILIES["bart"].build()
    inputs = FAMILIES["bart"].inputs(model)
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model, only=only)
    output = generate(model, inputs, num_beams=2, return_dict_in_generate=True)
    assert output.sequences.equal(expected)
    layer = output.past_key_values.self_attention_cache.layers[0]
    assert (layer.k.shape[1] if only == "attention" else layer.keys.shape[2]) == 12
