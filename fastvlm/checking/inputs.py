"""From a user's batch to the calls that are compared: in evaluation, in training, generate()."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import checks

_ONLY_PATCHED = ("image_of_prompt", "prompt_of_target", "groups", "num_groups")
_SHIFT = "prepare_decoder_input_ids_from_labels"
_TARGETS = ("labels", "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
NEW_TOKENS, BEAMS = 16, 3


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.check: model must be a torch.nn.Module; got {type(model)!r}")
    if not hasattr(model, "config"):
        raise TypeError(
            "fastvlm.check: model must be a model of transformers, or one that passes its config "
            f"on (PEFT); got {type(model).__name__}, without a config"
        )
    places = {parameter.device.type for parameter in model.parameters()}
    if not places:
        raise checks.fail("check", "model", "one with parameters", type(model))
    if "meta" in places:
        raise checks.fail(
            "check", "model", "on a device; its parameters are on meta (offloaded?)", type(model)
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fastvlm.check: call it outside of torch.inference_mode()")


def check_settings(generate: Any, train: Any, exact: Any) -> None:
    for name, value in (("train", train), ("exact", exact)):
        if not isinstance(value, bool):
            raise TypeError(f"fastvlm.check: {name} must be True or False; got {value!r}")
    if generate is None or generate is False:
        return
    if not isinstance(generate, Mapping):
        wanted = "None, False or a dict of generate()'s settings"
        raise TypeError(f"fastvlm.check: generate must be {wanted}; got {generate!r}")
    if generate.get("do_sample"):
        raise checks.fail(
            "check", "generate", "without do_sample: what is drawn says nothing", dict(generate)
        )


def batch_of(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The user's batch as keyword arguments, tensors copied: no call changes what was given."""
    if not isinstance(inputs, Mapping):
        wanted = "a dict of one call's keyword arguments (what a processor or collator gives)"
        raise TypeError(f"fastvlm.check: inputs must be {wanted}; got {type(inputs)!r}")
    batch = dict(inputs)
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise checks.fail(
            "check", "inputs", 'a dict with tensors (return_tensors="pt")', list(batch)
        )
    if batch.get("past_key_values") is not None:
        raise checks.fail(
            "check", "inputs", "without past_key_values: a call would change them", list(batch)
        )
    if only := [name for name in _ONLY_PATCHED if batch.get(name) is not None]:
        raise checks.fail(
            "check",
            "inputs",
            f"without {', '.join(only)}: only a patched model takes it",
            list(batch),
        )
    device = next(model.parameters()).device
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.device.type != device.type:
            where = f"on {device}, as the model is: inputs.to(model.device)"
            raise checks.fail("check", f"inputs[{name!r}]", where, str(value.device))
    return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in batch.items()}


def describe_batch(batch: Mapping[str, Any]) -> str:
    shown = [f"{n} {list(v.shape)}" for n, v in batch.items() if isinstance(v, Tensor)]
    return ", ".join(shown)


class Calls:
    """The calls of one model that one batch leads to.

    forward: of evaluation, with labels left out where that is possible. labelled: with labels;
    None where there are none. Where a batch has no labels, those of a decoder alone are its own
    tokens, and `answer` makes an encoder-decoder's of what it generates.
    """

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        self.encodes = bool(getattr(model.config, "is_encoder_decoder", False))
        self.batch = batch
        self.made_labels = batch.get("labels") is None
        self.forward: dict[str, Any] | None = batch
        self.labelled: dict[str, Any] | None = None if self.made_labels else batch
        self._mask: Tensor | None = None
        given = self._given_targets()
        if not self.made_labels:
            labels = batch["labels"]
            if not isinstance(labels, Tensor) or labels.dim() != 2:
                raise checks.fail(
                    "check", "inputs['labels']", "an int64 tensor [batch, length]", labels
                )
            self._mask = up_to_last(labels)
            self.forward = {n: v for n, v in batch.items() if n != "labels"}
            if self.encodes and not given:
                shift = getattr(model, _SHIFT, None)
                if shift is None:
                    self.forward = None  # its labels alone say what the decoder is given
                else:
                    self.forward["decoder_input_ids"] = shift(labels)
        elif not self.encodes and isinstance(batch.get("input_ids"), Tensor):
            mask = batch.get("attention_mask")
            labels = batch["input_ids"]
            if isinstance(mask, Tensor) and mask.shape == labels.shape:
                labels = labels.masked_fill(mask == 0, -100)
            self.labelled = {**batch, "labels": labels}
        elif self.encodes and not given:
            self.forward = None
        name = "decoder_attention_mask" if self.encodes else "attention_mask"
        if isinstance(batch.get(name), Tensor):
            self._mask = batch[name] != 0

    @property
    def needs_answer(self) -> bool:
        return self.forward is None and self.labelled is None

    def answer(self, tokens: Tensor, end: set[int], fill: int) -> None:
        """tokens [B, 1 + n] that the model generated: what an encoder-decoder is trained on."""
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        for token in end:
            ended |= tokens == token
        ended[:, 0] = False
        seen = ended.long().cumsum(1) - ended.long() == 0
        ids = tokens.masked_fill(~seen, fill)
        self.forward = {**self.batch, "decoder_input_ids": ids}
        self._mask = seen
        labels = tokens[:, 1:].masked_fill(~seen[:, 1:], -100)
        self.labelled = {**self.batch, "labels": labels}

    def generation(self) -> dict[str, Any]:
        """The batch as a prompt."""
        left_out = ("labels",) if self.made_labels else _TARGETS
        return {n: v for n, v in self.batch.items() if n not in left_out}

    def positions(self, shape: torch.Size) -> Tensor | None:
        """Which of the logits' rows [B, L] are tokens; None for all."""
        fits = self._mask is not None and self._mask.shape == shape
        return self._mask if fits else None

    def _given_targets(self) -> bool:
        names = ("decoder_input_ids", "decoder_inputs_embeds")
        return any(self.batch.get(name) is not None for name in names)


def up_to_last(labels: Tensor) -> Tensor:
    """labels [B, L] -> bool: a row's last label that counts, and all before it."""
    return (labels != -100).long().flip(1).cumsum(1).flip(1) > 0


def searches(generate: Any) -> dict[str, dict[str, Any]]:
    """The settings of the searches that are compared, by their names."""
    if generate is False:
        return {}
    given = dict(generate or {})
    base: dict[str, Any] = {"do_sample": False}
    if not {"max_new_tokens", "max_length"} & set(given):
        base["max_new_tokens"] = NEW_TOKENS
    beams = given.pop("num_beams", BEAMS)
    alone = {n: v for n, v in given.items() if n not in _OF_BEAMS}
    found = {"greedy tokens": {**base, **alone, "num_beams": 1}}
    if beams > 1:
        several = {} if generate else {"num_return_sequences": beams}
        found[f"tokens of {beams} beams"] = {**base, **given, **several, "num_beams": beams}
    return found


_OF_BEAMS = ("num_return_sequences", "early_stopping", "length_penalty", "num_beam_groups")
