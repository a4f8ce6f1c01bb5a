"""What weights in fewer bits change in the log-probabilities of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.compat import hf
from fastvlm.patching.classes import is_patched, swapped, unpatched_class
from fastvlm.patching.weights import CONV, LINEAR, is_approximate

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class LogProbChange:
    """Of the most probable token at each position, as the model's own weights have it.

    mean, max: |change| of its log-probability (nats). agreement: at what share of the positions it
    still is the most probable one. positions: how many there are, without padding.
    """

    mean: float
    max: float
    agreement: float
    positions: int

    def __str__(self) -> str:
        told = (
            f"log-probability of the most probable token at {self.positions} positions: off by "
            f"{self.mean:.2e} on average, {self.max:.2e} at most; it is the same token at "
            f"{self.agreement:.1%}"
        )
        if self.max == 0:
            told += (
                " (nothing was computed in fewer bits: compute= is for 65 rows and more at once)"
            )
        return told


def log_prob_change(model: nn.Module, inputs: Mapping[str, Any]) -> LogProbChange:
    """Compare a model that is patched with weights or compute to itself without them.

    model: patched with ``weights`` or ``compute``, "bf16" or "int8". inputs: keyword arguments of
    one call of it, for an encoder-decoder with labels or decoder_input_ids. Runs the model twice,
    in eval mode and without gradients; padding (labels of -100, zeros of the mask) does not count.
    All positions go through the decoder at once, and with weights its layers read them in fewer
    bits, however many rows that makes, as the steps of a caption do.

    Raises TypeError for what is no nn.Module or no mapping, ValueError for a model without such
    weights, or for inputs of an encoder-decoder without labels or decoder_input_ids, with a cache
    (a call would change it) or nothing but padding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.log_prob_change: model must be a torch.nn.Module; got {model!r}")
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "fastvlm.log_prob_change: inputs must be a mapping, the keyword arguments of one call; "
            f"got {type(inputs).__name__}"
        )
    if not any(_reads_a_copy(module) for module in model.modules()):
        raise ValueError(
            "fastvlm.log_prob_change: model must be patched with weights or compute, and have "
            f"layers that follow; got {type(model).__name__}, all of whose weights are its own "
            '(fastvlm.patch(model, weights="int8"); its report says what is left and why)'
        )
    if hf.cache_in(inputs) is not None:
        raise ValueError("fastvlm.log_prob_change: inputs must be without past_key_values")
    if _encodes(model) and not {"labels", *_DECODER_INPUTS} & inputs.keys():
        raise ValueError(
            "fastvlm.log_prob_change: inputs must have labels or decoder_input_ids; got "
            f"{', '.join(inputs)}"
        )
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            with _own_weights(model):
                logits: Tensor = model(**inputs).logits
            counted = _counted(model, inputs, logits)
            best, own = _best(logits[counted])
            with _as_in_steps():
                logits = model(**inputs).logits[counted]
    finally:
        for module in in_training:
            module.training = True
    if best.numel() == 0:
        raise ValueError("fastvlm.log_prob_change: inputs must have a position that is no padding")
    change = (_log_probs(logits, best) - own).abs()
    same = (logits.argmax(-1) == best).double()
    return LogProbChange(
        change.mean().item(), change.max().item(), same.mean().item(), best.numel()
    )


def _encodes(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _as_in_steps() -> contextlib.AbstractContextManager[None]:
    from fastvlm.nn.compute import as_in_steps  # loads torch.compile: a second

    return as_in_steps()


def _reads_a_copy(module: nn.Module) -> bool:
    return is_patched(module) and is_approximate(module)


@contextlib.contextmanager
def _own_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers compute with their own weights; the copies are kept."""
    changed = {m: type(m) for m in model.modules() if _reads_a_copy(m)}
    for module in changed:
        plain = CONV if isinstance(module, nn.Conv2d) else LINEAR
        module.__class__ = swapped(unpatched_class(module), plain)
    try:
        yield
    finally:
        for module, cls in changed.items():
            module.__class__ = cls


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.argmax(-1)
    return best, _log_probs(logits, best)


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    wide = logits.float()
    return wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)


def _counted(model: Any, inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Which positions of the logits are no padding, by the mask or the labels of the decoder."""
    if _encodes(model) or "decoder_input_ids" in inputs:
        mask = inputs.get("decoder_attention_mask")
        if mask is None and inputs.get("labels") is not None:
            mask = inputs["labels"] != -100
    else:
        mask = inputs.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:-1]:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return mask.to(logits.device).bool()
