"""Runs the calls that are compared, and gives what they gave as named tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlm.checking.inputs import Calls
from fastvlm.checking.numbers import Numbers
from fastvlm.checking.tokens import alike


@dataclass(frozen=True)
class Steps:
    """tokens [rows, length], the logits [rows, steps, V] behind the generated ones (greedy search
    alone), and the token that fills up rows that ended."""

    tokens: Tensor
    logits: Tensor
    fill: int
    ends: frozenset[int]

    @property
    def prompt(self) -> int:
        return self.tokens.shape[1] - self.logits.shape[1]

    def aligned(self, other: Steps) -> Tensor:
        """other's logits as far as both had the same tokens before, and none had ended."""
        out = self.logits.clone()
        apart = alike(other.tokens, self.tokens, self.fill)
        for row in range(min(out.shape[0], other.logits.shape[0])):
            seen = apart.get(row, self.tokens.shape[1]) - self.prompt + 1
            seen = min(seen, self._length(row), out.shape[1], other.logits.shape[1])
            out[row, :seen] = other.logits[row, :seen]
        return out

    def gap(self, scores: Tensor, ours: Tensor, row: int, place: int) -> float:
        """How much better transformers finds its token of a row than the other."""
        step = place - self.prompt
        if not 0 <= step < scores.shape[1] or place >= ours.shape[1]:
            return float("inf")
        best, other = self.tokens[row, place], ours[row, place]
        return (scores[row, step, best] - scores[row, step, other]).abs().item()

    def _length(self, row: int) -> int:
        new = self.tokens[row, self.prompt :].tolist()
        ended = [i for i, token in enumerate(new) if token in self.ends]
        return ended[0] + 1 if ended else len(new)


class Runner:
    """modes: of the model's modules, in training; None for what they are in now."""

    def __init__(self, model: Any, calls: Calls, modes: list[bool] | None = None) -> None:
        self.model, self.calls = model, calls
        self.modes = modes or [module.training for module in model.modules()]

    def dtypes(self) -> set[torch.dtype]:
        """Of the arithmetic: of the weights that are multiplied with, or of autocast."""
        weights = (p for p in self.model.parameters() if p.is_floating_point() and p.dim() > 1)
        found = {p.dtype for p in weights if p.dtype.itemsize > 1} or {torch.float32}
        kind = next(self.model.parameters()).device.type
        return found | (
            {torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else set()
        )

    def batch_size(self) -> int:
        rows = next(v for v in self.calls.generation().values() if isinstance(v, Tensor))
        return rows.shape[0]

    def ends(self) -> tuple[set[int], int]:
        """The tokens that end a text, and the one that fills up."""
        config = self.model.generation_config
        end = config.eos_token_id
        ends = set() if end is None else {end} if isinstance(end, int) else set(end)
        fill = config.pad_token_id
        return ends, fill if fill is not None else next(iter(ends), 0)

    def evaluation(self) -> dict[str, Numbers]:
        torch.manual_seed(0)
        self.model.eval()
        found: dict[str, Numbers] = {}
        with torch.no_grad():
            if self.calls.forward is not None:
                found["logits"] = {"logits": self._tokens_of(self._call(self.calls.forward))}
            if self.calls.labelled is not None and not self.calls.made_labels:
                outputs = self._call(self.calls.labelled)
                if getattr(outputs, "loss", None) is not None:
                    found["loss"] = {"loss": outputs.loss}
                # with labels they come another way than without
                found["logits beside the loss"] = {"logits": self._tokens_of(outputs)}
        return found

    def training(self, seed: int = 0) -> dict[str, Numbers]:
        torch.manual_seed(seed)
        if self.modes[0]:
            for module, mode in zip(self.model.modules(), self.modes):
                module.training = mode
        else:
            self.model.train()
        assert self.calls.labelled is not None
        with torch.enable_grad():
            outputs = self._call(self.calls.labelled)
            if getattr(outputs, "loss", None) is None:
                raise ValueError("its output has no loss for these labels")
            loss = outputs.loss
            del outputs
            loss.backward()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        for parameter in self.model.parameters():
            parameter.grad = None
        return {"training loss": {"loss": loss.detach()}, "gradients": gradients}

    def tokens(self, settings: Mapping[str, Any]) -> Tensor:
        out = self._generate(settings)
        return out if isinstance(out, Tensor) else out.sequences

    def steps(self, settings: Mapping[str, Any], with_logits: bool) -> Steps:
        ends, fill = self.ends()
        if not with_logits:
            tokens = self.tokens(settings)
            return Steps(tokens, tokens.new_zeros(tokens.shape[0], 0, 1), fill, frozenset(ends))
        asked = {"return_dict_in_generate": True, "output_logits": True}
        out = self._generate({**settings, **asked})
        return Steps(out.sequences, torch.stack(out.logits, 1), fill, frozenset(ends))

    def scores(self, settings: Mapping[str, Any]) -> Tensor:
        """[rows, steps, V], by which greedy search chooses."""
        asked = {"return_dict_in_generate": True, "output_scores": True}
        return torch.stack(self._generate({**settings, **asked}).scores, 1)

    def _generate(self, settings: Mapping[str, Any]) -> Any:
        torch.manual_seed(0)
        self.model.eval()
        with torch.no_grad():
            return self.model.generate(**_fresh(self.calls.generation()), **settings)

    def _call(self, batch: Mapping[str, Any]) -> Any:
        outputs = self.model(**_fresh(batch))
        if isinstance(outputs, tuple) or not hasattr(outputs, "logits"):
            raise ValueError(
                f"{type(self.model).__name__} gives {type(outputs).__name__}, which has no logits: "
                "give the model with its head, and return_dict as it is by default"
            )
        return outputs

    def _tokens_of(self, outputs: Any) -> Tensor:
        """The logits [tokens, V] where there is no padding."""
        logits = outputs.logits
        where = self.calls.positions(logits.shape[:-1])
        return logits.flatten(0, -2) if where is None else logits[where.to(logits.device)]


def _fresh(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A call of its own: generate() writes into encoder_outputs that it is given."""
    return {n: copy.copy(v) if isinstance(v, dict) else v for n, v in batch.items()}
