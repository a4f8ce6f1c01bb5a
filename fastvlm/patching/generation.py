"""generate() of a patched model: the decoding loop is fastvlm's (`fastvlm.generate`).

transformers prepares inputs, caches, processors and criteria as ever, and calls the loop that it is
given as ``custom_generate``. Its own loops stay for a streamer, ``stop_strings``, ``synced_gpus``,
an assistant, a loop or ``custom_generate`` of somebody else, and where scores, logits, attentions
or hidden states are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from fastvlm.compat import hf, pytorch
from fastvlm.compat.versions import attention_refused
from fastvlm.cpu.common import unavailable
from fastvlm.decoding import cache as shared
from fastvlm.decoding.scores import TokenScores
from fastvlm.generate.bans import MIN_LENGTH, unknown
from fastvlm.generate.beams import search, serve
from fastvlm.generate.ends import Ends
from fastvlm.generate.feed import Asked, CannotJoin, Feed
from fastvlm.generate.head import Last
from fastvlm.generate.plan import Plan, Written
from fastvlm.generate.sampling import sample
from fastvlm.generate.steps import Read, Steps
from fastvlm.loss.request import LossRequest
from fastvlm.nn.linear import is_low_precision, is_plain
from fastvlm.ops import dispatch
from fastvlm.patching.bare import bare_stack
from fastvlm.patching.logits import State, show_lazily
from fastvlm.patching.recorded import RecordedLogits, computes_recorded
from fastvlm.run.mixin import Mixin
from fastvlm.run.program import has_no_hooks

# rows of 16 bits up to which the CPU's ranking streams the weight (MAX_ROWS of
# fastvlm/cpu/gemm.py); with more it begins with a float32 copy, and takes 2.5 times as long
_FEW_16_BIT_ROWS = 64
# settings of generate() that call for a loop of transformers', or for one that it loads
_OTHER_LOOPS = (
    "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "prompt_lookup_num_tokens",
    "assistant_early_exit", "stop_strings", "low_memory", "num_beam_groups",
)  # fmt: skip
_OTHERS = ("streamer", "synced_gpus", "assistant_model", "custom_generate")
# processors of transformers that see each row by itself
_BY_ROW = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper",
    "RepetitionPenaltyLogitsProcessor", "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization",
    "ExponentialDecayLengthPenalty",
)  # fmt: skip


@dataclass
class Recording:
    """A forward of a model in a decoding loop. runs: it is running."""

    model: nn.Module
    head: nn.Module
    runs: bool = False


# of the loop that runs in this thread
_RECORDING: ContextVar[Recording | None] = ContextVar("fastvlm_recording", default=None)


def recording_for(head: nn.Module) -> bool:
    """Whether a loop's forward calls this head, whose logits are to be recorded."""
    recording = _RECORDING.get()
    if recording is None or computes_recorded():
        return False
    return recording.runs and recording.head is head


@contextmanager
def forward_of(model: nn.Module) -> Iterator[bool]:
    """A forward of model; whether its logits are recorded."""
    recording = _RECORDING.get()
    if recording is None or recording.model is not model or recording.runs:
        yield False
        return
    recording.runs = True
    try:
        yield True
    finally:
        recording.runs = False


@contextmanager
def _recorded(recording: Recording | None) -> Iterator[None]:
    """Forwards of a loop; with a recording of what becomes of the head's output."""
    token, hook = _RECORDING.set(recording), None
    if recording is not None and not getattr(recording.head, "gives_lazy_logits", False):
        hook = recording.head.register_forward_hook(_record)
    try:
        yield
    finally:
        _RECORDING.reset(token)
        if hook is not None:
            hook.remove()


def _record(head: Any, args: tuple[Any, ...], out: Tensor) -> Any:
    """Behind a head that computes by itself: its weight has fewer bits."""
    if not recording_for(head):
        return None
    h, request = args[0], LossRequest()
    return RecordedLogits(h, head.weight, head.bias, request, out.dtype, State.now(h), head=head)


class OwnLoop(Mixin):
    """A model whose generate() runs fastvlm's decoding loop where that does what was asked."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        generate: Any = super().generate  # type: ignore[misc]
        if attention_refused() is not None or not hf.takes_own_loop(generate):
            return generate(*args, **kwargs)
        given = hf.arguments_of_generate(args, kwargs)
        if self._wants_another_loop(given):
            return generate(*args, **kwargs)
        names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
        brought = [each for name in names for each in _listed(given.get(name))]
        theirs = [one for one in brought if not (isinstance(one, TokenScores) or _by_row(one))]
        kept = hf.cache_in(given) is not None
        loop = partial(_decode, watched=bool(theirs), kept=kept)
        return generate(*args, custom_generate=loop, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return self._of_own_generate("_sample", args, kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        return self._of_own_generate("_beam_search", args, kwargs)

    def _of_own_generate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The loop of a class with a generate() of its own (Whisper's), which passes none on. What
        it did before, and what its caller brought, is not known here."""
        theirs: Any = super()
        others = kwargs.get("streamer") is not None or kwargs.get("synced_gpus") or len(args) != 1
        if others or attention_refused() is not None or hf.takes_own_loop(theirs.generate):
            return getattr(theirs, name)(*args, **kwargs)
        if self._wants_another_loop({"generation_config": kwargs["generation_config"]}):
            return getattr(theirs, name)(*args, **kwargs)
        taken = {k: v for k, v in kwargs.items() if k not in ("streamer", "synced_gpus")}
        return _decode(self, args[0], watched=True, kept=True, **taken)

    def _wants_another_loop(self, given: dict[str, Any]) -> bool:
        if any(given.get(name) not in (None, False) for name in _OTHERS):
            return True
        if given.get("cache_implementation") == "paged":
            return True
        theirs: Any = super()
        if not all(hf.is_own_loop(getattr(theirs, name), name) for name in hf.LOOPS):
            return True
        configs = [vars(c) for c in (given.get("generation_config"), self.generation_config) if c]
        for name in _OTHER_LOOPS:
            asked = next((v for c in (given, *configs) if (v := c.get(name)) is not None), None)
            if asked and not (name == "num_beam_groups" and asked == 1):
                return True
        return hf.syncs_gpus(self)

    def _head_needs_logits(self, rows: int, loop: str) -> str | None:
        """Why the best of the head cannot be ranked without logits; None where they can."""
        head = self.get_output_embeddings()
        around = getattr(self, "lm_head", head)  # T5Gemma's holds the head
        if is_low_precision(head):
            on_cpu = head.weight.device.type == "cpu" and dispatch.forced() in (None, "cpu")
            if not on_cpu or unavailable() is not None:
                return "its head has a weight of fewer bits, and no kernel ranks what comes of it"
        elif not getattr(head, "gives_lazy_logits", False) or not is_plain(head):
            return "its head is no plain nn.Linear"
        if around is not head and _is_hooked(around):
            return "there is a hook around its head"
        weight = head.weight
        if weight.shape != (head.out_features, head.in_features):
            return "its head is sharded"
        if weight.dtype == torch.float64:
            return "no kernel ranks in float64"
        return _slower(weight, rows, loop)

    def _records(self) -> Recording | None:
        """The recording of a loop's forwards; None where the head is to be called as it is."""
        head = self.get_output_embeddings()
        around = getattr(self, "lm_head", head)
        known = isinstance(head, nn.Linear) and (is_plain(head) or is_low_precision(head))
        if not known or not has_no_hooks(head) or (around is not head and _is_hooked(around)):
            return None
        return Recording(self, head)


def _by_row(one: Any) -> bool:
    """Whether a processor or criterion of the caller says that it looks at each row by itself, and
    at nothing else."""
    return getattr(one, "by_row", False) is True


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _slower(weight: Tensor, rows: int, loop: str) -> str | None:
    """Why logits are faster here, as measured; None where they are not."""
    if weight.device.type != "cpu":
        return None
    if loop == "_sample":
        # the largest logit needs no normalisation: the ranking has 0.9 to 1.1 times the speed
        return "on a CPU the largest of a row is found as soon in its logits"
    if weight.dtype.itemsize < 4 and rows > _FEW_16_BIT_ROWS:
        return "on a CPU many rows of 16 bits are ranked more slowly"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or pytorch.has_hooks(module, backward=False)


def _decode(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
    generation_config: Any, watched: bool = False, kept: bool = False, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """What generate() calls in place of its own loop. watched: by processors or criteria that the
    caller brought, which may look at all rows, or do something to the model. kept: the caller
    brought the cache, and keeps it."""
    config = generation_config
    name = "_sample" if config.num_beams == 1 else "_beam_search"
    notes = next((c for c in stopping_criteria if isinstance(c, TokenScores)), None)
    ends = Ends([c for c in stopping_criteria if c is not notes], getattr(notes, "stop", None))
    shown = config.output_logits or config.output_attentions or config.output_hidden_states
    # a criterion before the notes looks at scores that they then empty
    shown = shown or (config.output_scores and (notes is None or ends.others))
    if torch.is_grad_enabled() or (config.return_dict_in_generate and shown):
        loop = getattr(super(OwnLoop, model), name)
        return loop(
            input_ids, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, generation_config=config, **model_kwargs,
        )  # fmt: skip
    foreign = [p for p in logits_processor if unknown([p]) is not None]
    by_row = all(type(p).__name__ in _BY_ROW or _by_row(p) for p in foreign)
    leaves = (
        not (watched or kept)
        and by_row
        and (notes is not None or not config.return_dict_in_generate)
        and not (config.do_sample and config.num_beams > 1)
    )
    plan = _planned(
        model, input_ids, logits_processor, ends, config, model_kwargs, leaves, bare=not watched
    )
    plan.notes = None if notes is None or notes.beams else notes
    if name == "_sample":
        with hf.optimized_for_decoding(model):
            written = sample(plan, input_ids)
    else:
        with shared.in_groups(hf.cache_in(model_kwargs)):
            written = search(plan, input_ids)
    return _output(model, config, written, plan.steps.cache)


def _planned(
    model: Any, ids: Tensor, processors: Any, ends: Ends, config: Any, kwargs: dict[str, Any],
    leaves: bool, bare: bool,
) -> Plan:  # fmt: skip
    """leaves: whether rows may leave the batch; bare: whether the model may be left out of its
    steps."""
    recording = model._records()
    stack = bare_stack(model) if bare and recording is not None else None
    if recording is not None and stack is None and is_low_precision(recording.head):
        recording = None  # it computes its logits first, and would again at each step
    listed = list(processors)
    foreign = unknown(listed) is not None
    ranks = not foreign and not config.do_sample and recording is not None
    name = "_sample" if config.num_beams == 1 else "_beam_search"
    ranks = ranks and model._head_needs_logits(ids.shape[0], name) is None
    steps = Steps(
        model,
        partial(_prefill, model, recording, config),
        partial(_call, model, recording, hf.forward_of_steps(model, config, kwargs)),
        kwargs,
        ids.device,
        stack=stack,
        leaves=leaves,
    )
    return Plan(
        steps,
        ends,
        config,
        ids.device,
        processors=processors if foreign else None,
        known=() if foreign else tuple(listed),
        ranks=ranks,
    )


def cannot_join(model: Any, given: dict[str, Any]) -> str | None:
    """Why images cannot come into a running loop of generate(**given); None where nothing is known
    that stands against it."""
    if not isinstance(model, OwnLoop):
        return "the model is not patched, or by its class not with a loop"
    theirs: Any = super(OwnLoop, model)
    if attention_refused() is not None or not hf.takes_own_loop(theirs.generate):
        return "transformers' own loop runs"
    if model._wants_another_loop(given):
        return "what was asked for is done by a loop of transformers'"
    if not all(map(_by_row, _listed(given.get("stopping_criteria")))):
        return "stopping_criteria sees one batch"
    for name in ("logits_processor", "prefix_allowed_tokens_fn"):
        if given.get(name):
            return f"{name} sees one batch"
    return None


def serve_feed(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
    generation_config: Any, asked: Asked, feed: Feed, **model_kwargs: Any,
) -> Tensor:  # fmt: skip
    """A custom_generate: begun with one search, it goes on while feed has more. Gives the ids it
    was given. CannotJoin: where that cannot be."""
    config, ends = generation_config, Ends(stopping_criteria)
    if config.min_new_tokens is not None:
        # transformers says the same by a length, which is another for each beginning
        said = LogitsProcessorList(p for p in logits_processor if type(p) is not MIN_LENGTH)
        logits_processor = said
    foreign = unknown(logits_processor)
    at_begin = any(type(p).__name__.startswith("SuppressTokensAtBegin") for p in logits_processor)
    reasons = {
        "it draws tokens": config.do_sample,
        f"{foreign} sees the scores of one batch": foreign is not None,
        "its time is limited": ends.is_timed,
        "criteria see all rows": not all(map(_by_row, ends.others)),
        "begin_suppress_tokens has another place in other rows": at_begin and len(input_ids[0]) < 2,
        "it keeps no cache": not model_kwargs.get("use_cache"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotJoin(reason)
    plan = _planned(
        model, input_ids, logits_processor, ends, config, model_kwargs, leaves=True, bare=True
    )
    with hf.optimized_for_decoding(model), shared.in_groups(hf.cache_in(model_kwargs)):
        serve(plan, input_ids, asked, feed)
    return input_ids


def _prefill(
    model: Any, recording: Recording | None, config: Any, ids: Tensor, kwargs: dict[str, Any]
) -> Read:
    with _recorded(recording):
        outputs = model._prefill(ids, config, kwargs, is_first_iteration=not config.is_assistant)
    return _read(outputs)


def _call(model: Any, recording: Recording | None, forward: Any, **arguments: Any) -> Read:
    with _recorded(recording):
        outputs = forward(**arguments, return_dict=True)
    return _read(outputs)


def _read(outputs: Any) -> Read:
    show_lazily(outputs)  # this is the loop; anybody else who looks gets a tensor
    logits = outputs.logits
    last = logits.last() if isinstance(logits, RecordedLogits) else Last(logits=logits[:, -1])
    return Read(outputs, last)


def _output(model: Any, config: Any, written: Written, cache: Any) -> Any:
    if not config.return_dict_in_generate:
        return written.sequences
    fields: dict[str, Any] = {"sequences": written.sequences, **hf.cached(cache)}
    if written.beams is not None:
        fields["beam_indices"] = written.beams
        fields["sequences_scores"] = written.scores if config.output_scores else None
    return hf.generate_output(model.config.is_encoder_decoder, written.beams is not None)(**fields)
