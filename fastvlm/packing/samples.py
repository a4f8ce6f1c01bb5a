"""What users hand over, brought into one form: an image and the targets that read it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastvlm.checks import describe, fail

Group = tuple[str | None, str | None]

_PROMPT_KEYS = ("prompt_ids", "input_ids", "prompt")
_TARGET_KEYS = ("label_ids", "labels", "text")


@dataclass(frozen=True)
class Target:
    """One text to be produced: its prompt and its labels, each a string or token ids."""

    prompt: str | tuple[int, ...]
    labels: str | tuple[int, ...]
    task: str | None = None
    language: str | None = None

    @property
    def group(self) -> Group:
        return (self.task, self.language)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its targets.

    image: what the sample carried; is_pixels: it is ready to be stacked (``pixel_values``), else it
    goes through the image processor. image_id: the sample's own, or None, where the object that
    holds the image is its identity.
    """

    image: Any
    is_pixels: bool
    image_id: Hashable | None
    targets: tuple[Target, ...]

    @property
    def identity(self) -> Hashable:
        """Equal for samples that show one image."""
        if self.image_id is None:
            return ("object", id(self.image))
        return ("id", self.image_id)


class PreparedSample(Sample):
    """A sample that a collator's ``prepare`` has been through: ids, cut, with chosen targets."""


def parse(sample: Sample | Mapping[str, Any], op: str = "packing") -> Sample:
    """A sample in either of its two forms (see PackingCollator) as a Sample.

    ValueError: no image, no targets, a target without prompt or labels, an unhashable image_id.
    """
    if isinstance(sample, Sample):
        return sample
    if not isinstance(sample, Mapping):
        raise fail(
            op, "a sample", "a mapping such as {'pixel_values': ..., 'targets': ...}", sample
        )
    name = next((key for key in ("pixel_values", "image") if sample.get(key) is not None), None)
    if name is None:
        raise fail(op, "a sample", "given 'pixel_values' or 'image'", sorted(map(str, sample)))
    image_id = sample.get("image_id")
    if isinstance(image_id, Tensor):
        image_id = image_id.item()
    if not isinstance(image_id, Hashable):
        raise fail(op, "image_id", "hashable, such as a string or a number", image_id)
    given = sample.get("targets")
    if given is None:
        given = [sample]
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise fail(op, "targets", "a list of mappings", given)
    targets = tuple(_target(target, op) for target in given)
    if not targets:
        raise fail(op, "targets", "at least one", list(targets))
    return Sample(sample[name], name == "pixel_values", image_id, targets)


def find_groups(samples: Iterable[Sample | Mapping[str, Any]]) -> list[Group]:
    """All (task, language) pairs of the samples, sorted: the same list on every rank and run.

    Goes over everything once; where that is too much, write the list down and give it instead.
    """
    found = {target.group for sample in samples for target in parse(sample).targets}
    return sorted(found, key=lambda group: tuple((part is not None, part or "") for part in group))


def _target(given: Any, op: str) -> Target:
    if isinstance(given, Target):
        return given
    if not isinstance(given, Mapping):
        raise fail(op, "a target", "a mapping such as {'prompt': ..., 'text': ...}", given)
    return Target(
        _text("the prompt of a target", _first(given, _PROMPT_KEYS, op), op),
        _text("the labels of a target", _first(given, _TARGET_KEYS, op), op),
        given.get("task"),
        given.get("language"),
    )


def _first(given: Mapping[str, Any], keys: Sequence[str], op: str) -> Any:
    for key in keys:
        if given.get(key) is not None:
            return given[key]
    wanted = "given one of " + ", ".join(repr(key) for key in keys)
    raise fail(op, "a target", wanted, sorted(map(str, given)))


def _text(name: str, value: Any, op: str) -> str | tuple[int, ...]:
    """Strings stay; lists, arrays and tensors of ids become tuples of ints."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not all(type(token) is int for token in value):
        raise ValueError(
            f"fastvlm.{op}: {name} must be a string or a 1-D sequence of token ids; "
            f"got {describe(value)}"
        )
    return tuple(value)
