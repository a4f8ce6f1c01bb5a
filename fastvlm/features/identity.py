"""What kept features depend on besides the picture, and what differs between two of these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastvlm.checks import fail
from fastvlm.compat import pytorch
from fastvlm.features.keys import bytes_of
from fastvlm.nn.linear import original

OP = "VisionFeatures"
FORMAT = 1
# of a config, and of an image processor: what says nothing of the numbers
_TRAINING_ONLY = ("drop_path_rate", "initializer_range")
_NUMBERS = ("eps", "scale", "scaling")
_NAMES_ONLY = ("processor_class", "_processor_class", "return_tensors")

Identity = dict[str, Any]


def identity_of(
    parts: Mapping[str, nn.Module], transform: Mapping[str, Any] | None, part: str, dtype: str
) -> Identity:
    """parts: the modules whose output is kept, by name. part: the last of them.

    Without "arithmetic", which is known when the first features are computed.
    """
    return {
        "format": FORMAT,
        "part": part,
        "dtype": dtype,
        "code": {
            f"{name}.{key}": value
            for name, module in parts.items()
            for key, value in code_of(module).items()
        },
        "transform": transform,
        "structure": structure_of(parts),
        "weights": weights_of(parts),
    }


def code_of(module: nn.Module) -> dict[str, Any]:
    """The class of a module, and what its own config says of how it computes."""
    cls = original(type(module))
    config = getattr(module, "config", None)
    told: dict[str, Any] = {}
    if config is not None and hasattr(config, "to_dict"):
        told = {
            name: value
            for name, value in config.to_dict().items()
            if name not in _general(config) and name not in _TRAINING_ONLY
        }
    return _plain({"class": f"{cls.__module__}.{cls.__qualname__}", **told})


def _general(config: Any) -> set[str]:
    """The fields that every config of transformers has, whatever the model."""
    from transformers import PretrainedConfig

    return {*PretrainedConfig().to_dict(), "transformers_version", "model_type"}


def structure_of(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """By name: the class of each module within some, and its numbers that are no weights.

    Among these which adapters count: PEFT switches them without touching a weight.
    """
    return {
        name: _structure(module)
        for prefix, part in parts.items()
        for name, module in part.named_modules(prefix=prefix)
        if not _passes_on(module)
    }


def _passes_on(module: nn.Module) -> bool:
    """Whether it gives back its input in evaluation: with a rate of 0 models leave it out."""
    drops = type(module).__name__.endswith("DropPath") or pytorch.drops(module)
    return drops or isinstance(module, nn.Identity)


def _structure(module: nn.Module) -> str:
    cls = original(type(module))
    told = [f"{name} {vars(module)[name]}" for name in _NUMBERS if name in vars(module)]
    if (compute := getattr(type(module), "compute", None)) is not None:
        from fastvlm.nn.compute import rounds_rows  # loads torch.compile: a second

        branches = ", its branches in bf16" if rounds_rows(compute) else ""
        told.append(f"computed in {compute}{branches}")
    # models of transformers have methods of these names
    if isinstance(off := getattr(cls, "disable_adapters", None) and module.disable_adapters, bool):
        told.append("adapters off" if off else f"adapters {module.active_adapters}")
    return ", ".join([cls.__qualname__, *told])


def tensors_of(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer of some modules, with its name."""
    for prefix, module in parts.items():
        yield from module.named_parameters(prefix=prefix)
        yield from module.named_buffers(prefix=prefix)


def weights_of(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """By name: dtype, shape and a hash of the values of each parameter and buffer."""
    return {name: weight_of(name, tensor) for name, tensor in tensors_of(parts)}


def weight_of(name: str, weight: Tensor) -> str:
    """ValueError: it is not whole in this process (sharded, or on the meta device)."""
    whole = not weight.is_meta and type(weight).__name__ != "DTensor"
    size = weight.numel() * weight.element_size()
    if not whole or weight.untyped_storage().nbytes() < size:
        wanted = (
            "a model whose vision tower is whole in each process, so that its weights can be "
            f"compared (leave it out of what is sharded); {name} is not"
        )
        raise fail(OP, "model", wanted, weight)
    digest = hashlib.blake2b(bytes_of(weight), digest_size=16).hexdigest()
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{dtype} {list(weight.shape)} {digest}"


def transform_of(image_processor: Any) -> dict[str, Any] | None:
    """What an image processor does to a picture, as it writes it down itself."""
    if image_processor is None:
        return None
    if not hasattr(image_processor, "to_dict"):
        wanted = "an image processor of transformers, or None where images come as pixel_values"
        raise fail(OP, "image_processor", wanted, image_processor)
    told = {k: v for k, v in image_processor.to_dict().items() if k not in _NAMES_ONLY}
    return _plain({"class": type(image_processor).__name__, **told})


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what is read compares with what was written."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str, sort_keys=True))
    return plain


def digest(identity: Identity) -> str:
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(kept: Identity, here: Identity) -> list[str]:
    """What differs, in words: one entry for each thing that the features depend on."""
    found = []
    for name in ("format", "part", "dtype"):
        if kept.get(name) != here[name]:
            found.append(f"{name} {kept.get(name)!r}, here {here[name]!r}")
    for name in ("code", "transform"):
        found += _changed(name, kept.get(name), here[name])
    for what, hidden in (("weights", 24), ("structure", 0)):  # of a hash a few digits are enough
        before, now = kept.get(what, {}), here[what]
        names = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
        if names:
            first = names[0]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            shown = f"{_shown(before.get(first), hidden)}, here {_shown(now.get(first), hidden)}"
            found.append(f"other {what}: {first} ({shown}){more}")
    return found


def _shown(told: str | None, hidden: int) -> str:
    return "none" if told is None else told[: len(told) - hidden]


def _changed(name: str, before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if not isinstance(before, dict) or not isinstance(now, dict):
        given = ("none" if one is None else "one" for one in (before, now))
        return ["{} {}, here {}".format(name, *given)]
    return [
        f"{name} {key}: {_short(before.get(key))}, here {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 120 else f"{text[:117]}..."
