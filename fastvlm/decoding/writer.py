"""One generate() call for all that is asked about a batch of images: prompts, beginnings, beams."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import fail
from fastvlm.decoding.encode import Encoded, encode_once
from fastvlm.decoding.languages import OP
from fastvlm.decoding.prefixes import left_padded, may_pad, row_positions
from fastvlm.decoding.scores import TokenScores, ended
from fastvlm.generate import feed
from fastvlm.generate.feed import Arrival, Feed

# what a writer makes itself, or what would make rows depend on each other
_REFUSED = (
    "input_ids", "inputs", "inputs_embeds", "pixel_values", "attention_mask", "decoder_input_ids",
    "decoder_attention_mask", "encoder_outputs", "past_key_values", "cache",
    "return_dict_in_generate",
    "output_scores", "output_logits", "max_length", "custom_generate", "assistant_model",
    "prompt_lookup_num_tokens", "prompt_of_target", "image_of_prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What is asked about each image: the prompt, and the words that its answer begins with."""

    prompt: str
    prefix: str = ""


@dataclass(frozen=True)
class Written:
    """One answer: to asked[place] about images[image], the rank-th best of it.

    tokens: the generated ids, the end token with them, without the prefix. score: `Caption.score`.
    """

    image: int
    place: int
    rank: int
    tokens: tuple[int, ...]
    score: float


@dataclass
class _Target:
    """One of asked: its place, the ids that its rows begin with, and which prompt they read."""

    place: int
    begun: list[int]
    prompt: int


class Writer:
    """A model with its tokenizers and the settings of generate(), checked once.

    op: the function that error messages name. The other arguments are those of `fastvlm.caption`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tokenizer: Any = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int = 128,
        generate_kwargs: dict[str, Any] | None = None,
        op: str = OP,
    ) -> None:
        self.op = op
        self.model = model
        kwargs = {} if generate_kwargs is None else generate_kwargs
        _check(op, model, max_new_tokens, num_beams, kwargs)
        self.words, self.target_words = _tokenizers(op, model, processor, tokenizer)
        self._options = _Options(model, kwargs, num_beams, max_new_tokens)
        if self._options.value("stop_strings") is not None:
            self._options.kwargs["tokenizer"] = self.target_words
        self._start = _start_ids(op, self._options, self.target_words)

    @property
    def names_target(self) -> bool:
        """Whether the model's task prompts name the language of the answer."""
        return getattr(self.model.config, "model_type", None) == "florenz"

    def write(
        self,
        pixels: Tensor | Mapping[str, Any],
        asked: Sequence[Asked],
        *,
        seed: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Written]:
        """Answers to all of asked about pixel_values [images, 3, H, W], image by image, or about
        what `fastvlm.VisionFeatures.pixel_values` gives.

        stop: called between steps; once it returns True the answers end as they are.
        """
        used = list(dict.fromkeys(one.prompt for one in asked))
        targets = [
            _Target(
                place, self._start + _ids(self.target_words, one.prefix), used.index(one.prompt)
            )
            for place, one in enumerate(asked)
        ]
        prompts = [_prompt_ids(self.words, text) for text in used]
        encoded = encode_once(self.model, pixels, prompts)
        found: list[Written] = []
        with _seeded(seed, self.model.device):
            for group in _together(self.model, self._options, targets):
                found += _decode(self.model, encoded, group, self._options, stop)
        return sorted(found, key=lambda one: (one.image, one.place, one.rank))

    def cannot_join(self) -> str | None:
        """Why answers cannot come and go in a loop that runs, each by itself; None where nothing
        is known that stands against it."""
        from fastvlm.patching.generation import cannot_join

        settings = {**self._options.kwargs, "generation_config": self._options.config}
        return cannot_join(self.model, settings)

    def arrival(
        self, pixels: Tensor | Mapping[str, Any], asked: Sequence[Asked], tags: Sequence[Any]
    ) -> Arrival:
        """What images, encoded, bring to a loop: each with all of asked, tagged (tag, place)."""
        used = list(dict.fromkeys(one.prompt for one in asked))
        encoded = encode_once(self.model, pixels, [_prompt_ids(self.words, text) for text in used])
        begun = [(*self._start, *_ids(self.target_words, one.prefix)) for one in asked]
        joining = [
            feed.Asked((tag, place), begun[place], image * len(used) + used.index(one.prompt))
            for image, tag in enumerate(tags)
            for place, one in enumerate(asked)
        ]
        return Arrival(encoded.states, encoded.mask, encoded.input_ids, tuple(joining))

    def serve(self, first: Arrival, source: Feed) -> None:
        """Answer what an arrival of one search asks, and what source has for as long as the loop
        runs. CannotJoin: the model, or what was asked of generate(), is for one batch."""
        from transformers.modeling_outputs import BaseModelOutput

        from fastvlm.patching.generation import serve_feed

        (one,) = first.asked
        kwargs = {
            **self._options.kwargs, "return_dict_in_generate": False, "output_scores": False
        }  # fmt: skip
        if self._options.config is not None:
            config = copy.deepcopy(self._options.config)
            config.update(return_dict_in_generate=False, output_scores=False)
            kwargs["generation_config"] = config
        self.model.generate(
            input_ids=first.input_ids,
            encoder_outputs=BaseModelOutput(first.states),
            attention_mask=first.mask,
            decoder_input_ids=torch.tensor([one.begun], device=first.input_ids.device),
            custom_generate=partial(serve_feed, asked=one, feed=source),
            **kwargs,
        )

    def written(self, found: list[tuple[list[int], float]], place: int) -> list[Written]:
        """What a search found (`fastvlm.generate.feed.Feed.done`), as `write` gives it."""
        beams, penalty = self._options.value("num_beams", 1), self._options.value("length_penalty")
        stops = self._options.kwargs.get("stopping_criteria")
        filler = self._options.value("pad_token_id") if stops else None
        answers = []
        for rank, (tokens, score) in enumerate(found):
            kept = ended(tokens, self._options.end_ids, filler)
            if beams == 1:
                score /= len(kept) ** (1.0 if penalty is None else penalty)
            answers.append(Written(0, place, rank, tuple(kept), score))
        return answers

    def text(self, tokens: Sequence[int], prefix: str = "") -> str:
        """Without special tokens, its first letter upper-cased; prefix stands before it."""
        shown = [*(_ids(self.target_words, prefix) if prefix else ()), *tokens]
        text = self.target_words.decode(shown, skip_special_tokens=True).strip()
        return text[:1].upper() + text[1:]


class _Options:
    """What generate() is called with, and what follows from that and the model's defaults."""

    def __init__(
        self, model: Any, kwargs: dict[str, Any], num_beams: int | None, max_new_tokens: int
    ) -> None:
        self.kwargs = dict(kwargs)
        self.defaults = model.generation_config
        self.config = copy.deepcopy(self.kwargs.pop("generation_config", None))
        ours: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "return_dict_in_generate": True,
            "output_scores": True,
        }  # fmt: skip
        if num_beams is not None:
            ours["num_beams"] = num_beams
        if self.config is None:
            self.kwargs.update(ours)
        else:
            self.config.update(**ours)
            self.kwargs["generation_config"] = self.config

    def value(self, name: str, default: Any = None) -> Any:
        """As generate() will find it: its arguments, the config given, the model's."""
        for source in (self.kwargs, vars(self.config or object), vars(self.defaults)):
            if source.get(name) is not None:
                return source[name]
        return default

    @property
    def end_ids(self) -> list[int]:
        ids = self.value("eos_token_id", [])
        return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def _check(
    op: str, model: Any, max_new_tokens: Any, num_beams: Any, kwargs: dict[str, Any]
) -> None:
    config = getattr(model, "config", None)
    parts = ("generate", "get_image_features", "get_encoder", "get_input_embeddings")
    if not getattr(config, "is_encoder_decoder", False) or not all(
        hasattr(model, name) for name in parts
    ):
        raise TypeError(
            f"fastvlm.{op}: model must be a Florence-2 or Florenz model with its head; "
            f"got {type(model).__name__}"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        optional = name == "num_beams" and value is None
        if not optional and (not isinstance(value, int) or value < 1):
            raise fail(op, name, "a whole number, 1 or more", value)
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            wanted = f"left out ({op}() makes it, or max_new_tokens and images say it)"
            raise fail(op, name, wanted, kwargs[name])


def _tokenizers(op: str, model: Any, processor: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Of the prompts and of the captions."""
    words = getattr(processor, "tokenizer", None)
    if words is None:
        raise fail(op, "processor", "one with a tokenizer", processor)
    if tokenizer is None and model.config.model_type == "florenz":
        wanted = "given: the captions of Florenz have a vocabulary of their own"
        raise fail(op, "tokenizer", wanted, None)
    return words, words if tokenizer is None else tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    # as Florence2Processor does: special tokens written out, none added
    return _ids(tokenizer, f"{tokenizer.bos_token or ''}{text}{tokenizer.eos_token or ''}")


def _start_ids(op: str, options: _Options, tokenizer: Any) -> list[int]:
    """The decoder's start token, then bos, which all these models are trained to write first."""
    start = options.value("decoder_start_token_id", options.value("bos_token_id"))
    if start is None:
        raise fail(op, "model", "one whose generation_config has a decoder_start_token_id", None)
    bos = tokenizer.bos_token_id
    return [start] if bos is None or bos == start else [start, bos]


def _together(model: Any, options: _Options, targets: list[_Target]) -> list[list[_Target]]:
    """Targets that one generate() call may write: all, or those of one length of prefix.

    A min_length counts the padding. A row of the start token alone (no bos, no prefix) would look
    like padding to a ban on n-grams.
    """
    lengths = {len(target.begun) for target in targets}
    exact = may_pad(model) and min(lengths) > 1
    exact &= not options.value("min_length")
    if len(lengths) == 1 or exact:
        return [targets]
    return [[t for t in targets if len(t.begun) == length] for length in sorted(lengths)]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _decode(
    model: Any,
    encoded: Encoded,
    targets: list[_Target],
    options: _Options,
    stop: Callable[[], bool] | None,
) -> list[Written]:
    """One generate() call."""
    from transformers import StoppingCriteriaList
    from transformers.modeling_outputs import BaseModelOutput

    targets = sorted(targets, key=lambda target: target.prompt)
    rows = [(image, target) for image in range(encoded.num_images) for target in targets]
    read = [image * encoded.num_prompts + target.prompt for image, target in rows]
    ids, mask, pads = left_padded([target.begun for _, target in rows], encoded.states.device)
    given = {"decoder_input_ids": ids}
    if mask is not None:
        given["decoder_attention_mask"] = mask
    index = _encoder_rows(model, read, ids.device)
    states, states_mask = encoded.states, encoded.mask
    if index.tolist() != list(range(states.shape[0])):
        states, states_mask = states.index_select(0, index), states_mask.index_select(0, index)
    noted = TokenScores(beams=options.value("num_beams", 1) > 1, stop=stop)
    kwargs = dict(options.kwargs)
    criteria = [*(kwargs.pop("stopping_criteria", None) or ()), noted]
    with row_positions(model, pads):
        output = model.generate(
            # not encoded again: it says how many rows there are, and what the prompts were
            input_ids=encoded.input_ids[read],
            encoder_outputs=BaseModelOutput(states),
            attention_mask=states_mask,
            stopping_criteria=StoppingCriteriaList(criteria),
            **given,
            **kwargs,
        )
    begun, ranks = ids.shape[1], output.sequences.shape[0] // len(rows)
    may_stop = len(criteria) > 1 or options.value("stop_strings") is not None
    filler = options.value("pad_token_id") if may_stop else None
    penalty = options.value("length_penalty", 1.0)
    scores = getattr(output, "sequences_scores", None)
    found = []
    for row, sequence in enumerate(output.sequences.tolist()):
        tokens = ended(sequence[begun:], options.end_ids, filler)
        score = float(scores[row]) if scores is not None else noted.of(row, len(tokens), penalty)
        image, target = rows[row // ranks]
        found.append(Written(image, target.place, row % ranks, tuple(tokens), score))
    return found


def _encoder_rows(model: Any, read: list[int], device: torch.device) -> Tensor:
    """The encoder's rows to hand to generate(), where decoder row r reads row read[r].

    A patched model lets equally many neighbours read one row, so a row stands once for them; where
    prompts have unequally many languages it is repeated as little as that allows.
    """
    from fastvlm.patching.language_model import shares_states

    readers = 1
    if any(shares_states(module) for module in model.modules()):
        readers = gcd(*(len(list(run)) for _, run in groupby(read)))
    return torch.tensor(read[::readers], device=device)
