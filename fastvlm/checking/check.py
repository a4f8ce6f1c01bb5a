"""fastvlm.check: the same batch through a model with and without fastvlm, and what differs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastvlm.checking import inputs as given
from fastvlm.checking.calls import Runner, Steps
from fastvlm.checking.exact import Exact, exact_copy
from fastvlm.checking.keeping import kept, without_dropout
from fastvlm.checking.meters import MIB, meter
from fastvlm.checking.numbers import BACKWARD, FORWARD, Numbers, Yardstick, eps_of
from fastvlm.checking.result import DIFFERENT, LEFT_OUT, SAME, TIE, Check, Cost, Verdict
from fastvlm.checking.sides import SIDES, Sides, other_ways, reordered
from fastvlm.checking.tokens import alike, rows_in_words

T = TypeVar("T")
ROUNDS = 2
_GRADIENTS = "gradients"


def check(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    generate: Mapping[str, Any] | bool | None = None,
    train: bool = True,
    exact: bool = False,
) -> Check:
    """Run a batch of yours through the model without and with fastvlm; say what differs.

    Compared are the logits at all tokens and the loss in evaluation, the loss and every gradient in
    training, the logits of each greedy decoding step, and the tokens of greedy and of beam search;
    seconds and memory of each stand beside them. Nothing of the model changes: after it, also after
    an error, parameters, gradients, modes, random states, hooks, buffers and configuration are as
    they were, and it is patched if it was. Hooks of yours on the model do run.

    model: a model of transformers, of any dtype, with adapters or without. One that is patched is
    checked as it is; another is patched as `fastvlm.patch` does by default, and unpatched again.
    Where ``model.training`` is set, modules keep the modes that they have in training.
    inputs: the keyword arguments of one call, as a processor or collator gives them, on the model's
    device. Without labels, a decoder alone is trained on its own input_ids, an encoder-decoder on
    what it generates.
    generate: settings of ``generate()``, without do_sample; greedy search and, of ``num_beams`` (3)
    beams, beam search run with them. None: 16 new tokens, and every beam is compared. False: no
    generation.
    train: whether to compare a training step. All dropout is off in it, on both sides: the two draw
    other numbers from one seed.
    exact: measure by a copy of the model in float64 instead of by the spread; where memory does not
    suffice, a note says so and the spread serves.

    How far numbers may be apart: two results that keep the package's rule, |fastvlm - exact| <= 2
    |transformers - exact| (gradients: 3), are apart by at most 3 (4) times |transformers - exact|.
    What stands for that is the spread of transformers' own results on this batch, between its eager
    and sdpa attention and other orders of its sums; two roundings of the largest value come on top.
    Tokens must be the same, but where their scores are equal to that accuracy.

    Returns a `Check`: ``print`` it, ask ``.ok``, or leave with ``.exit_code``.

    Raises TypeError and ValueError for arguments that it cannot use, or that the model cannot run
    without fastvlm, PatchError where nothing can be patched. What fails with fastvlm alone is a
    difference.
    """
    given.check_model(model)
    given.check_settings(generate, train, exact)
    with torch.inference_mode(False):
        batch = given.batch_of(model, inputs)
        inner = getattr(model, "_orig_mod", model)  # of torch.compile(model)
        with kept(inner):
            checking = _Checking(inner, batch, generate, train, exact)
            if inner is not model:
                checking.result.notes.append("the model inside torch.compile(model) was compared")
            return checking.run()


class _Checking:
    """One check, within which the model may be changed."""

    def __init__(
        self, model: Any, batch: dict[str, Any], generate: Any, train: bool, exact: bool
    ) -> None:
        self.result = Check(type(model).__name__, given.describe_batch(batch))
        without_dropout(model)
        self.result.notes += _uncompiled(model)
        self.sides = Sides(model)
        self.result.patch_report = self.sides.report
        self.sides.choose("transformers")
        self.searches = given.searches(generate) if _generates(model) else {}
        self.asked = bool(generate)
        self.calls = given.Calls(model, batch)
        self.runner = Runner(model, self.calls)
        self.train = train
        self.ways = other_ways(model)
        self.meter = meter(next(model.parameters()).device)
        self.result.memory_method = self.meter.method
        self.eps = eps_of(self.runner.dtypes())
        self._failed: set[str] = set()
        self.exact: Exact | None = None
        self.wants_exact = exact

    def run(self) -> Check:
        with self.meter:
            if self.calls.needs_answer:
                self._answer()
            if self.wants_exact:
                self._copy()
            self._numbers("forward", self.runner.evaluation, required=True)
            if self.train:
                self._training()
            for what, settings in self.searches.items():
                self._search(what, settings)
        used = " and ".join(way for way, _ in self.ways if way not in self._failed)
        rule = f"{FORWARD:.0f}x (gradients {BACKWARD:.0f}x) what transformers is off from float64"
        if self.exact is None:
            rule = (
                f"{FORWARD + 1:.0f}x (gradients {BACKWARD + 1:.0f}x) the spread of transformers "
                f"itself: {used or 'none could be had'}"
            )
        self.result.yardstick = f"{rule}; and two roundings ({self.eps:.1e}) of the largest value"
        return self.result

    def _answer(self) -> None:
        """What an encoder-decoder without labels is compared on: its own greedy tokens."""
        if not self.searches:
            raise ValueError(
                "fastvlm.check: inputs must have labels or decoder_input_ids where nothing is to "
                f"be generated; got {self.result.batch}"
            )
        settings = next(iter(self.searches.values()))
        tokens = self._own("generate()", lambda: self.runner.tokens(settings), required=True)
        assert tokens is not None
        self.calls.answer(tokens, *self.runner.ends())

    def _copy(self) -> None:
        copied = exact_copy(self.runner, self.train)
        if isinstance(copied, str):
            self.result.notes.append(f"exact: {copied}; the spread serves instead")
        else:
            self.exact = copied

    def _training(self) -> None:
        if self.calls.labelled is None:
            self.result.notes.append("training: there are no labels, and none can be made")
            return
        if not any(p.requires_grad for p in self.runner.model.parameters()):
            self.result.notes.append("training: no parameter wants gradients")
            return
        first = self._numbers("training step", self.runner.training, not self.calls.made_labels)
        if first is None:
            return
        again = self._on("transformers", lambda: self.runner.training(seed=1))["training loss"]
        apart = {k: (again[k] - v).abs().item() for k, v in first["training loss"].base.items()}
        if any(off > first["training loss"].allowed(name) for name, off in apart.items()):
            why = "with another seed the loss is another: something draws at random"
            self.result.verdicts = [
                Verdict(v.what, LEFT_OUT, detail=why) if v.what in first else v
                for v in self.result.verdicts
            ]

    def _numbers(
        self, phase: str, call: Callable[..., dict[str, Numbers]], required: bool
    ) -> dict[str, Yardstick] | None:
        """Compare what a call gives; None where transformers itself cannot run it."""
        own = self._own(phase, call, required)
        if own is None:
            return None
        bases = own
        if self.exact is not None:
            with self.exact.running():
                bases = getattr(self.exact.runner, call.__name__)()
        extra = 0.0 if self.exact is not None else 1.0
        yards = {
            what: Yardstick(base, self.eps, extra + (BACKWARD if what == _GRADIENTS else FORWARD))
            for what, base in bases.items()
        }
        if self.exact is not None:
            for what, yard in yards.items():
                yard.add("as it is", own[what])
        own = {}
        ours = self._ours(call, list(yards))
        for way, context in self.ways:
            found = self._by(way, context, call)
            for what, yard in yards.items():
                if found is not None:
                    yard.add(way, found[what])
        for what, yard in yards.items():
            for way in yard.dropped():
                self._leave_out(way, "it computes something else")
            if ours is not None:
                self.result.verdicts.append(yard.judge(_title(what, yard), ours[what]))
        if ours is not None:
            self._cost(phase, call)
        return yards

    def _search(self, what: str, settings: dict[str, Any]) -> None:
        """Compare tokens, and of greedy search the logits of each step."""
        greedy = settings["num_beams"] == 1
        own = self._own(what, lambda: self.runner.steps(settings, greedy), self.asked)
        if own is None:
            return
        ours = self._ours(lambda: self.runner.steps(settings, greedy), [what])
        if ours is None:
            return
        yard = Yardstick({"steps": own.logits}, self.eps, FORWARD + 1) if greedy else None
        if yard is not None:
            for way, context in self.ways:
                found = self._by(way, context, lambda: self.runner.steps(settings, True))
                if found is not None:
                    yard.add(way, {"steps": own.aligned(found)})
            yard.dropped()
            self.result.verdicts.append(
                yard.judge("logits of greedy steps", {"steps": own.aligned(ours)})
            )
        plain = self._ours(lambda: self.runner.steps(settings, False), [what])
        if plain is None:
            return
        self.result.verdicts.append(self._tokens(what, settings, own, plain, yard))
        self._cost(what, lambda: self.runner.tokens(settings))

    def _tokens(
        self, what: str, settings: dict[str, Any], own: Steps, ours: Steps, yard: Yardstick | None
    ) -> Verdict:
        differ = alike(ours.tokens, own.tokens, own.fill)
        if differ and yard is not None:  # Whisper's generate() gives other rows with logits
            same = self._on("transformers", lambda: self.runner.tokens(settings))
            differ = alike(ours.tokens, same, own.fill)
        if not differ:
            return Verdict(what, SAME)
        where = rows_in_words(differ)
        if yard is not None:
            scores = self._on("transformers", lambda: self.runner.scores(settings))
            bound = 2 * yard.allowed("steps")
            gaps = [own.gap(scores, ours.tokens, row, place) for row, place in differ.items()]
            worst = max(gaps)
            verdict = TIE if worst <= bound else DIFFERENT
            return Verdict(what, verdict, worst, bound, f"{where}; their scores are so far apart")
        rows = own.tokens.shape[0] // max(self.runner.batch_size(), 1)
        open_ = {row // max(rows, 1) for row in differ}
        for way, context in (*self.ways, *reordered(self.runner.model, 4, first=8)):
            found = self._by(way, context, lambda: self.runner.steps(settings, False))
            if found is not None:
                open_ -= {r // max(rows, 1) for r in alike(found.tokens, own.tokens, own.fill)}
            if not open_:
                detail = f"{where}; transformers' own ways differ there too"
                return Verdict(what, TIE, detail=detail)
        return Verdict(what, DIFFERENT, detail=where)

    def _on(self, side: str, call: Callable[[], T]) -> T:
        self.sides.choose(side)
        try:
            return call()
        finally:
            self.sides.choose("transformers")

    def _own(self, phase: str, call: Callable[[], T], required: bool) -> T | None:
        try:
            return self._on("transformers", call)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if required:
                raise ValueError(
                    f"fastvlm.check: inputs must be what the model can run without fastvlm; its "
                    f"{phase} fails there: {said}"
                ) from error
            self.result.notes.append(f"{phase}: transformers itself fails: {said}")
            return None

    def _ours(self, call: Callable[[], T], compared: list[str]) -> T | None:
        try:
            return self._on("fastvlm", call)
        except Exception as error:
            detail = f"with fastvlm it fails: {type(error).__name__}: {error}"
            self.result.verdicts += [Verdict(w, DIFFERENT, detail=detail) for w in compared]
            return None

    def _by(self, way: str, context: Callable[[], Any], call: Callable[[], T]) -> T | None:
        """Another of transformers' own ways; None where it has not got that one."""
        if way in self._failed:
            return None
        try:
            with context():
                return self._on("transformers", call)
        except Exception as error:
            self._leave_out(way, f"{type(error).__name__}: {error}")
            return None

    def _leave_out(self, way: str, why: str) -> None:
        if way not in self._failed:
            self._failed.add(way)
            self.result.notes.append(f"yardstick without {way}: {why.splitlines()[0]}")

    def _cost(self, what: str, call: Callable[[], Any]) -> None:
        """The fastest of some interleaved calls of each side, and what they take."""
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        mib: dict[str, list[float]] = {side: [] for side in SIDES}
        for side in SIDES * ROUNDS:
            self.sides.choose(side)
            self.meter.reset()
            start = time.perf_counter()
            with contextlib.suppress(Exception):  # it ran before: the verdict stands
                call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[side].append(time.perf_counter() - start)
            mib[side].append(max(self.meter.peak(), 0) / MIB)
        self.sides.choose("transformers")
        own, ours = SIDES
        least = (min(seconds[own]), min(seconds[ours])), (min(mib[own]), min(mib[ours]))
        self.result.costs.append(Cost(what, *least))


def _title(what: str, yard: Yardstick) -> str:
    if what == _GRADIENTS:
        return f"{len(yard.base)} gradients"
    if what.startswith("logits"):
        return f"{what} at {next(iter(yard.base.values())).shape[0]} tokens"
    return what


def _generates(model: Any) -> bool:
    able = getattr(model, "can_generate", None)
    return hasattr(model, "generate") and (able is None or bool(able()))


def _uncompiled(model: nn.Module) -> list[str]:
    """Take compiled forwards off the modules that hold one: it is of one side alone."""
    notes = []
    for name, module in model.named_modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward
            notes.append(f"{name or 'model'}: its forward was compared without torch.compile")
    return notes
