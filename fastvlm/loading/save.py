"""`fastvlm.save_published`: a model back into the layout that its weights were published in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.loading import layouts, names, processors, publish
from fastvlm.loading.errors import named

_OP = "save_published"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def save_published(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    processor: Any = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model for the code that its kind was published with.

    model: Florence2ForConditionalGeneration, for Microsoft's code; or a Florenz model, for the code
        of arXiv 2503.09443 (patched or not). Its settings of generate() go along.
    folder: made where it is not there; it must hold no weights.
    processor: of images and prompts, written as Microsoft's processor reads it. tokenizer: of a
        Florenz model's captions, written into ``decoder_tokenizer``; `fastvlm.load` finds it there.
    max_shard_size: of a safetensors file, as save_pretrained takes it.

    ValueError: another kind of model, a config or weights that the published code has no place for
    (quantized ones, say), a folder with weights in it.
    """
    layout = _layout(model)
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(any(place.glob(g)) for g in _WEIGHTS)):
        raise fail(_OP, "folder", "a folder without weights, or none yet", str(folder))
    raw = publish.published(layout, model.config, model.generation_config)
    state = _state(model, layout)
    floats = next(value.dtype for value in state.values() if value.is_floating_point())
    raw["torch_dtype"] = str(floats).removeprefix("torch.")
    gemma = "Gemma2" if raw["text_config"].get("gemma_config") else "2"
    raw["architectures"] = [f"Florence{gemma}ForConditionalGeneration"]
    place.mkdir(parents=True, exist_ok=True)
    _write_weights(place, state, max_shard_size)
    if processor is not None:
        processors.save_for_theirs(processor, place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place / processors.DECODER_FOLDER)
    # last: a folder that was not finished has no config
    (place / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _layout(model: Any) -> str:
    kinds = {"Florence2ForConditionalGeneration": "microsoft"}
    kinds["FlorenzForConditionalGeneration"] = "paper"
    for cls in type(model).__mro__:
        if cls.__name__ in kinds:
            return kinds[cls.__name__]
    wanted = "a Florence2ForConditionalGeneration or a FlorenzForConditionalGeneration"
    raise fail(_OP, "model", wanted, type(model).__name__)


def _state(model: Any, layout: str) -> dict[str, Tensor]:
    """Every tensor by its published name, tied ones as their code wants to find them."""
    held = model.state_dict()
    wanted = layouts.shapes(layouts.class_of(layout), model.config)
    odd = sorted(set(held) ^ set(wanted))
    odd += [name for name in held if name in wanted and tuple(held[name].shape) != wanted[name]]
    if odd:
        problem = "model must have the weights of its config and no others"
        raise ValueError(f"fastvlm.{_OP}: {problem}; not so: {named(odd)}")
    for ours, value in held.items():
        if not value.is_floating_point() or value.is_meta:
            raise fail(_OP, ours, "a float tensor with values", value)
    state = {names.published(ours): value.detach() for ours, value in held.items()}
    state[names.PROJECTION] = state[names.PROJECTION].T
    if layout == "microsoft":
        # two names of `shared`; the head is one more, but their code does not tie it when it loads
        del state[names.ENCODER_TABLE], state[names.DECODER_TABLE]
        head = state[names.HEAD]
        state[names.LOGITS_BIAS] = torch.zeros(1, head.shape[0], dtype=head.dtype)
    elif model.config.tie_word_embeddings:
        del state[names.HEAD]  # their code ties it
    return state


def _write_weights(folder: Path, state: dict[str, Tensor], max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    # safetensors writes no tensor twice, so each one is a copy, a file at a time
    split = split_torch_state_dict_into_shards(
        {name: _apart(name, value) for name, value in state.items()},
        max_shard_size=max_shard_size,
    )
    for file, held in split.filename_to_tensors.items():
        shard = {n: state[n].to("cpu", copy=True).contiguous() for n in held}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _apart(name: str, value: Tensor) -> Tensor:
    """A stand-in of the same size that shares its memory with no other."""
    return torch.empty_like(value, device="cpu") if name == names.HEAD else value
