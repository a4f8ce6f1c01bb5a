"""`fastvlm.load`: a checkpoint of any known layout as a model, with its processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastvlm.compat import hf
from fastvlm.compat.versions import needs_newer_transformers
from fastvlm.loading import configs, layouts, processors
from fastvlm.loading.errors import LoadError, first_line, named
from fastvlm.loading.source import Source, find
from fastvlm.loading.tensors import Entry, entries


@dataclass
class Loaded:
    """A model in eval mode and what belongs to it; ``model, processor = fastvlm.load(...)``.

    processor: of images and prompts, or a tokenizer where the model sees no images; None where
        the checkpoint has none. tokenizer: of the captions, where it is another one (Florenz).
    layout: "microsoft", "paper", "florenz" or "transformers". id: as given. commit: of a hub's
    checkpoint; None for a folder.
    """

    model: Any
    processor: Any
    tokenizer: Any
    layout: str
    id: str
    commit: str | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.processor))


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    processor: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Loaded:
    """A checkpoint of a folder or of the hub, as a model of transformers' or of `fastvlm.florenz`.

    Layouts (safetensors or ``.bin``, sharded or not):
    - Microsoft's Florence-2, whose repositories bring code -> Florence2ForConditionalGeneration,
      with the very logits and tokens of that code, which is not run;
    - the checkpoints of arXiv 2503.09443, four sizes -> FlorenzForConditionalGeneration;
    - transformers' own, of any model it knows, and fastvlm.florenz's.

    dtype: of the weights ("bfloat16" or torch.bfloat16); None or "auto": as config.json says, or as
        stored. device: where the model goes; None: the CPU, or as ``device_map`` says.
    processor: folder or id to take the processor from, where it does not lie beside the weights
        (for the paper's models e.g. "microsoft/Florence-2-large"). tokenizer: the same for that of
        a Florenz model's captions (e.g. "google/gemma-2-2b").
    image_size: pictures are scaled to a square of this side; None: as the processor's files say.
    revision, local_files_only, token, cache_dir: as transformers' from_pretrained takes them.
    trust_remote_code: only then does code of a checkpoint run, and only of a type of model that
        transformers does not know; none of the layouts above needs it.
    kwargs: go to from_pretrained (attn_implementation, device_map, quantization_config, …).

    Raises LoadError, a ValueError, for a checkpoint that does not load as it is: no config, an
    unknown type, missing, surplus or misshapen tensors, a file that is cut off or that holds more
    than tensors. Nothing is half loaded.
    """
    if device is not None and kwargs.get("device_map") is not None:
        raise ValueError(f"fastvlm.load: device must be None beside device_map; got {device!r}")
    hub = {
        "revision": revision,
        "local_files_only": local_files_only or None,
        "token": token,
        "cache_dir": cache_dir,
    }
    source = find(path_or_id, **hub)
    raw = source.config()
    layout = configs.layout_of(raw)
    if layout in ("microsoft", "paper"):
        model = _published(source, layout, raw, dtype, kwargs)
    else:
        model = _own(source, layout, raw, dtype, trust_remote_code, kwargs)
    if device is not None:
        model = model.to(device)
    other = {**hub, "revision": None}
    images = source if processor is None else find(processor, **other)
    words = source if tokenizer is None else find(tokenizer, **other)
    found = processors.of_images(images, layout, model.config, image_size, trust_remote_code)
    captions = None
    if layout in ("paper", "florenz"):
        captions = processors.of_captions(words, beside=tokenizer is None)
    return Loaded(model.eval(), found, captions, layout, source.id, source.commit)


def _published(
    source: Source, layout: str, raw: dict[str, Any], dtype: Any, kwargs: dict[str, Any]
) -> Any:
    if why := needs_newer_transformers("fastvlm.load of a published layout"):
        raise ImportError(why)
    stored = entries(source)
    tie = layouts.tie(layout, source.id, raw, stored)
    config = layouts.config_of(layout, source.id, raw, tie.tied)
    cls = layouts.class_of(layout)
    reads = layouts.match(layout, source.id, tie, layouts.shapes(cls, config), stored)
    chosen = _dtype(source, dtype, raw, reads)
    hf.set_commit(config, source.commit)
    model, told = cls.from_pretrained(
        None,
        config=config,
        state_dict=layouts.values(reads, chosen),
        dtype=chosen,
        output_loading_info=True,
        **kwargs,
    )
    _whole(source, told, strict=True)
    model.generation_config = configs.generation(raw)
    model.config.name_or_path = source.id
    return model


def _dtype(source: Source, asked: Any, raw: dict[str, Any], reads: dict[str, Entry]) -> torch.dtype:
    """What from_pretrained makes of dtype: the asked one, the config's, or the stored one."""
    if asked is None or asked == "auto":
        asked = raw.get("dtype") or raw.get("torch_dtype")
    if asked is None:
        return next(iter(reads.values())).read().dtype
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'fastvlm.load: dtype must be a float dtype, or "auto"; got {asked!r}')
    return found


def _own(
    source: Source, layout: str, raw: dict[str, Any], dtype: Any, trusted: bool,
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """As from_pretrained loads it; what that would only warn of is an error."""
    try:
        cls = _class(source, layout, raw, trusted)
        model, told = cls.from_pretrained(
            source.id,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **({"trust_remote_code": True} if trusted and "auto_map" in raw else {}),
            **source.again(),
            **kwargs,
        )
    except LoadError:
        raise
    except Exception as error:  # what reads files, configs and classes has errors of its own each
        raise LoadError(source.id, first_line(error)) from error
    kind = raw.get("model_type")
    if kind in _READ_NO_POOLER:
        told["missing_keys"] = [
            key for key in told["missing_keys"] if not key.startswith("encoder.pooler.")
        ]
    _whole(source, told, strict=kind in ("florence2", "florenz"))
    return model


def _class(source: Source, layout: str, raw: dict[str, Any], trusted: bool) -> Any:
    import transformers

    if layout == "florenz":
        from fastvlm.florenz import FlorenzForConditionalGeneration

        return FlorenzForConditionalGeneration
    names = raw.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if found is not None:
        return found
    if "auto_map" in raw and trusted:
        return transformers.AutoModel
    problem = "must be of a type that transformers or fastvlm knows; it is of model_type "
    problem += f"{raw.get('model_type')!r}, architectures {names}"
    if "auto_map" in raw:
        problem += "; its own code runs with trust_remote_code=True only"
    raise LoadError(source.id, problem)


# their decoder reads the encoder's last states, and checkpoints (TrOCR's) come without its pooler
_READ_NO_POOLER = ("vision-encoder-decoder", "encoder-decoder")


def _whole(source: Source, told: dict[str, Any], *, strict: bool) -> None:
    """LoadError where from_pretrained left something out, or made something up.

    strict: surplus tensors too, which many checkpoints of other models have.
    """
    for key, problem in (
        ("missing_keys", "missing"),
        ("mismatched_keys", "of another shape"),
        ("unexpected_keys", "without a place in the model"),
    ):
        found = sorted(map(_told, told.get(key) or ()))
        if found and (strict or key != "unexpected_keys"):
            raise LoadError(source.id, f"tensors {problem} ({len(found)}): {named(found)}")


def _told(key: Any) -> str:
    """A name, or for a mismatch the name, the shape in the file and the wanted one."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} must be {list(wanted)}, is {list(stored)}"
