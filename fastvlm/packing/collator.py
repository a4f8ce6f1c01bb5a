"""PackingCollator: each image once, each distinct prompt of it once, all its targets beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fastvlm.checks import choice, fail
from fastvlm.packing.balance import TargetBalancer, limit_targets
from fastvlm.packing.samples import Group, PreparedSample, Sample, Target, parse
from fastvlm.packing.tokens import Ids, PaddingSide, count, pad, token_id, tokenize, truncate

if TYPE_CHECKING:
    from fastvlm.features.kept import VisionFeatures

_OP = "packing.PackingCollator"
Batch = dict[str, Any]


class PackingCollator:
    """Makes a list of samples into one batch, for ``collate_fn=`` and ``data_collator=``.

    A sample is an image with its targets,
    ``{"pixel_values": [3, H, W], "image_id": ..., "targets": [{"task": ..., "language": ...,
    "prompt_ids": [...], "label_ids": [...]}, ...]}``, or one record ``{"pixel_values": ...,
    "input_ids": [...], "labels": [...], "task": ..., "language": ..., "image_id": ...}``. Text may
    stand for ids (``"prompt"``, ``"text"``) and ``"image"`` for pixel values; task, language and
    image_id are optional. Lists of samples within the list are joined, so that a dataset of
    packed lists can be loaded with a batch size of 1.

    The batch, in image order, then prompt order, so that ``image_of_prompt`` and
    ``prompt_of_target`` never fall:

    - pixel_values [I, 3, H, W]: each image once. Samples show one image if they have one
      image_id, or, without it, hold the very same object.
    - input_ids, attention_mask int64 [P, E]: the distinct prompts of each image, padded.
    - image_of_prompt int64 [P], prompt_of_target int64 [S].
    - labels int64 [S, L], padded with -100; decoder_input_ids int64 [S, L], the labels shifted
      right, where decoder_start_token_id is given.
    - groups int64 [S]: the index in ``groups`` of each target's (task, language); num_groups, an
      int, the same in every batch. Device moves of transformers, Accelerate and Lightning and
      pinned memory leave an int as it is. Without ``groups`` all targets are of group 0.

    Arguments, all by name:

    - groups: the (task, language) pairs. They are given and not discovered, because every rank and
      loader worker has its own copy of the collator and would number what it meets in an order
      of its own; ``find_groups`` makes the list from a dataset. An unknown pair is refused.
    - tokenizer, decoder_tokenizer: called as transformers' are, for prompts and for labels.
      decoder_tokenizer None: the same as tokenizer.
    - image_processor: called as ``image_processor(images=[...], return_tensors="pt")`` on the
      ``image`` of the batch's images.
    - vision_features: a `fastvlm.VisionFeatures`. The batch then holds kept features in place of
      pixel_values, and pictures whose features are kept go through no image_processor.
    - pad_token_id, decoder_pad_token_id, prompt_end_token_id, target_end_token_id: None for the
      tokenizer's. A decoder_pad_token_id is only needed for decoder_input_ids.
    - image_token_id, num_image_tokens: both or neither. Puts so many placeholders in front of each
      prompt (Florence-2: 1 + (S / 32)^2 at S pixels). A prompt that holds them already is left.
    - max_prompt_tokens, max_target_tokens: longer texts are cut, an end token at their end stays.
      Placeholders of the image do not count.
    - pad_to_multiple_of: of E and L. padding_side: of the prompts, "right" or "left".
    - max_targets_per_image, balance: at most so many targets of each sample: the first ones, or
      those that a TargetBalancer chooses (each loader worker goes on from its own copy).

    ValueError names the argument, what is wanted and what was given.
    """

    def __init__(
        self,
        *,
        groups: Iterable[Group] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        decoder_tokenizer: Callable[..., Any] | None = None,
        image_processor: Callable[..., Any] | None = None,
        vision_features: VisionFeatures | None = None,
        pad_token_id: int | None = None,
        decoder_pad_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        prompt_end_token_id: int | None = None,
        target_end_token_id: int | None = None,
        image_token_id: int | None = None,
        num_image_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        max_target_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: PaddingSide = "right",
        max_targets_per_image: int | None = None,
        balance: TargetBalancer | None = None,
    ) -> None:
        decoder_tokenizer = decoder_tokenizer if decoder_tokenizer is not None else tokenizer
        self.group_names = _groups(groups)
        self.tokenizer, self.decoder_tokenizer = tokenizer, decoder_tokenizer
        self.image_processor, self.vision_features = image_processor, vision_features
        if vision_features is not None:
            self.image_processor = vision_features.processor_for(image_processor, _OP)
        pad_id = token_id(tokenizer, "pad_token_id", pad_token_id)
        if pad_id is None:
            raise fail(_OP, "pad_token_id", "given where no tokenizer has one", pad_id)
        self.pad_token_id = pad_id
        self.decoder_pad_token_id = token_id(
            decoder_tokenizer, "pad_token_id", decoder_pad_token_id
        )
        self.decoder_start_token_id = decoder_start_token_id
        if decoder_start_token_id is not None and self.decoder_pad_token_id is None:
            raise fail(_OP, "decoder_pad_token_id", "given with decoder_start_token_id", None)
        self.prompt_end = token_id(tokenizer, "eos_token_id", prompt_end_token_id)
        self.target_end = token_id(decoder_tokenizer, "eos_token_id", target_end_token_id)
        if (image_token_id is None) != (num_image_tokens is None):
            given = {"image_token_id": image_token_id, "num_image_tokens": num_image_tokens}
            raise fail(_OP, "image_token_id and num_image_tokens", "given together", given)
        self.image_token_id, self.num_image_tokens = image_token_id, num_image_tokens
        for name, value in (
            ("num_image_tokens", num_image_tokens),
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_target_tokens", max_target_tokens),
            ("pad_to_multiple_of", pad_to_multiple_of),
            ("max_targets_per_image", max_targets_per_image),
        ):
            count(_OP, name, value)
        if balance is not None and max_targets_per_image is None:
            raise fail(_OP, "max_targets_per_image", "given with balance", None)
        choice(_OP, "padding_side", padding_side, ("right", "left"))
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens
        self.pad_to_multiple_of, self.padding_side = pad_to_multiple_of, padding_side
        self.max_targets_per_image, self.balance = max_targets_per_image, balance
        self._index = {group: index for index, group in enumerate(self.group_names)}
        self._has_groups = groups is not None
        self._worker: int | None = None

    def __call__(self, samples: Iterable[Any]) -> Batch:
        """The batch of the samples. ValueError: none, or a sample that does not fit (see above)."""
        images: dict[Any, Sample] = {}
        targets: dict[Any, dict[Ids, list[Target]]] = {}
        for sample in map(self.prepare, _flat(samples)):
            images.setdefault(sample.identity, sample)
            prompts = targets.setdefault(sample.identity, {})
            for target in sample.targets:
                assert isinstance(target.prompt, tuple)
                prompts.setdefault(target.prompt, []).append(target)
        if not images:
            raise fail(_OP, "samples", "at least one", [])
        rows = [
            (image, prompt, readers)
            for image, prompts in enumerate(targets.values())
            for prompt, readers in prompts.items()
        ]
        input_ids, attention_mask = pad(
            [prompt for _, prompt, _ in rows],
            self.pad_token_id,
            multiple=self.pad_to_multiple_of,
            side=self.padding_side,
        )
        readers = [(row, target) for row, (_, _, group) in enumerate(rows) for target in group]
        return {
            "pixel_values": self._images(list(images.values())),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_of_prompt": torch.tensor([image for image, _, _ in rows]),
            "prompt_of_target": torch.tensor([row for row, _ in readers]),
            **self._labels([target for _, target in readers]),
            "groups": torch.tensor([self._group(target) for _, target in readers]),
            "num_groups": len(self.group_names),
        }

    def prepare(self, sample: Sample | Mapping[str, Any]) -> PreparedSample:
        """The sample with its targets chosen, as ids, cut; the collator takes it as it is then."""
        if isinstance(sample, PreparedSample):
            return sample
        worker = get_worker_info()
        if worker is not None and worker.id != self._worker:
            self.seed_balance(worker.id)
        parsed = parse(sample, _OP)
        return self._tokenized(limit_targets(parsed, self.max_targets_per_image, self.balance))

    def lengths(self, sample: Sample | Mapping[str, Any]) -> tuple[int, int, int]:
        """Decoder tokens, encoder tokens (placeholders and all, each distinct prompt once) and
        images of a sample: what a batch sampler weighs. With ``balance`` all targets count,
        because which of them will be chosen is not known yet.
        """
        limit = None if self.balance is not None else self.max_targets_per_image
        ready = self._tokenized(limit_targets(parse(sample, _OP), limit, None))
        prompts = {target.prompt for target in ready.targets}
        return sum(len(t.labels) for t in ready.targets), sum(map(len, prompts)), 1

    def seed_balance(self, *parts: int) -> None:
        """Draws of the balancer from here on are those of (its seed, parts), counted from none."""
        worker = get_worker_info()
        self._worker = None if worker is None else worker.id
        if self.balance is not None:
            self.balance.reseed(*parts)

    def _tokenized(self, sample: Sample) -> PreparedSample:
        targets = tuple(self._target(target) for target in sample.targets)
        return PreparedSample(sample.image, sample.is_pixels, sample.image_id, targets)

    def _target(self, target: Target) -> Target:
        prompt = tokenize(target.prompt, self.tokenizer, "tokenizer", _OP)
        labels = tokenize(target.labels, self.decoder_tokenizer, "decoder_tokenizer", _OP)
        if not labels:
            raise fail(_OP, "the labels of a target", "at least one token", labels)
        return Target(
            self._with_image_tokens(prompt),
            truncate(labels, self.max_target_tokens, self.target_end),
            target.task,
            target.language,
        )

    def _with_image_tokens(self, prompt: Ids) -> Ids:
        if self.image_token_id is None or self.num_image_tokens is None:
            return truncate(prompt, self.max_prompt_tokens, self.prompt_end)
        image = (self.image_token_id,) * self.num_image_tokens
        given = prompt.count(self.image_token_id)
        if given not in (0, self.num_image_tokens) or (given and prompt[:given] != image):
            wanted = f"without image tokens, or with all {self.num_image_tokens} in front"
            raise fail(_OP, "the prompt of a target", wanted, prompt)
        return image + truncate(prompt[given:], self.max_prompt_tokens, self.prompt_end)

    def _labels(self, targets: Sequence[Target]) -> Batch:
        rows = [target.labels for target in targets if isinstance(target.labels, tuple)]
        labels, _ = pad(rows, -100, multiple=self.pad_to_multiple_of)
        if self.decoder_start_token_id is None or self.decoder_pad_token_id is None:
            return {"labels": labels}
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = self.decoder_start_token_id
        shifted.masked_fill_(shifted == -100, self.decoder_pad_token_id)
        return {"labels": labels, "decoder_input_ids": shifted}

    def _images(self, images: Sequence[Sample]) -> Tensor | Batch:
        """pixel_values, or what was kept of them."""
        kept = self.vision_features
        if kept is None:
            return self._pixel_values(images)
        given = (torch.as_tensor(one.image) if one.is_pixels else one.image for one in images)
        return kept.of_keys([kept.key(one) for one in given], lambda: self._pixel_values(images))

    def _pixel_values(self, images: Sequence[Sample]) -> Tensor:
        pixels: list[Any] = [sample.image for sample in images]
        raw = [i for i, sample in enumerate(images) if not sample.is_pixels]
        if raw:
            if self.image_processor is None:
                raise fail(_OP, "image_processor", "given where samples hold 'image'", None)
            processed = self.image_processor(images=[pixels[i] for i in raw], return_tensors="pt")
            for i, pixel in zip(raw, processed["pixel_values"], strict=True):
                pixels[i] = pixel
        tensors = [torch.as_tensor(pixel) for pixel in pixels]
        for tensor in tensors:
            if tensor.dim() != 3 or tensor.shape != tensors[0].shape:
                wanted = f"[3, H, W] and of one shape in a batch ({list(tensors[0].shape)})"
                raise fail(_OP, "pixel_values", wanted, tensor)
        return torch.stack(tensors)

    def _group(self, target: Target) -> int:
        if not self._has_groups:
            return 0
        if target.group not in self._index:
            wanted = f"to hold {target.group} of a target (packing.find_groups collects them all)"
            raise fail(_OP, "groups", wanted, self.group_names)
        return self._index[target.group]


def _groups(groups: Iterable[Group] | None) -> list[Group]:
    if groups is None:
        return [(None, None)]
    names = [tuple(group) for group in groups]
    if not names or len(set(names)) != len(names) or any(len(name) != 2 for name in names):
        raise fail(_OP, "groups", "distinct (task, language) pairs, at least one", names)
    return [(task, language) for task, language in names]


def _flat(samples: Iterable[Any]) -> Iterator[Any]:
    for sample in samples:
        if isinstance(sample, (list, tuple)):
            yield from sample
        else:
            yield sample
