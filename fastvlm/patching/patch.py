"""fastvlm.patch: put the kernels into one instance of a model, and take them out again.

A patched module keeps its parameters, buffers, name and place; only its class changes, to a
subclass of its own class whose ``forward`` is ours. So ``isinstance``, ``state_dict``, hooks,
pickle, deepcopy, DDP, FSDP and PEFT go on working, no class or module of another library is
touched, and the way back is to give the module its class again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from fastvlm.compat.versions import outside
from fastvlm.cpu import pages
from fastvlm.patching.classes import (
    PatchError,
    become,
    holds_our_forward,
    is_patched,
    swapped,
    unpatched_class,
)
from fastvlm.patching.foreign import own_forward
from fastvlm.patching.notes import notes_of
from fastvlm.patching.plan import entries_of, plan, streamed
from fastvlm.patching.report import Report
from fastvlm.patching.rules import FLOORS
from fastvlm.patching.weights import check_compute, check_weights


def patch(
    model: nn.Module,
    *,
    only: Collection[str] | str | None = None,
    weights: str | None = None,
    compute: str | None = None,
    strict: bool = False,
) -> Report:
    """Make a model train and decode on fastvlm's ops, in place; outputs stay the same.

    In training mode a padded batch is packed on the way in, and a call with labels computes its
    loss without logits, which are computed when ``outputs.logits`` is looked at (behind a row's
    last label they are the head's answer to zeros). Such a call also takes ``image_of_prompt``,
    ``prompt_of_target`` and ``groups`` (`fastvlm.patching.language_model.LossModel`).

    model: a transformers model (Florence-2, BART, Whisper, T5, BLIP, Gemma-2 and others, which
    README lists), one with the same structure, or a module that contains one (a trainer's wrapper,
    a PEFT model). Only this instance changes. Patching twice changes nothing more.
    only: the kinds of ops to patch in, of "attention", "mlp", "norm", "linear", "loss"; None for
    all.
    weights: for decoding only. "bf16" or "int8" (symmetric, one factor for each output row): linear
    layers that a decoding step runs read a copy of their weight in that type, made at the first
    call and again when the weight has changed, and compute in float32; outputs change a little
    (`log_prob_change`). Parameters and state_dict stay. A call that wants gradients raises
    RuntimeError. Patching again with other weights, or None, changes over to those; with the same,
    drops the copies.
    compute: for inference on a CPU only. Where gradients are off, linear layers multiply 65 rows
    and more in "int8" (`fastvlm.ops.int8_linear`: weights with one factor for each output row,
    activations quantized as they come, in groups of 64 neighbours; with AMX rounded to bfloat16) or
    "bf16" (`fastvlm.ops.bf16_linear`: both rounded; AMX or AVX-512 BF16): vision tower, encoder,
    prefill. The head keeps its own arithmetic. Outputs change a little (`log_prob_change`).
    Parameters and state_dict stay. Layers that cannot are left as they are, with the reason in the
    report, strict or not.
    strict: make any skipped module an error.

    On Linux the weights on the CPU that a decoding step reads move to huge pages, in place, where
    they are the process's own memory (`fastvlm.cpu.pages`); FASTVLM_HUGE_PAGES=0 refuses that.

    Returns the Report of what was patched with which op, and what was skipped and why.

    Raises TypeError for what is no nn.Module, ValueError for an unknown name in only, weights or
    compute, PatchError (a ValueError) where nothing matches, or something was skipped and strict is
    set. After an error the model is exactly as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.patch: model must be a torch.nn.Module; got {type(model)!r}")
    wanted = _wanted(only)
    check_weights("patch", weights, wanted)
    check_compute("patch", compute, wanted)
    changes = plan(model, wanted, weights, compute)
    report = Report(
        type(model).__name__,
        entries_of(changes, weights),
        notes=[*outside(), *notes_of(model, changes, weights, compute)],
    )
    if not report.patched:
        why = _by_reason(report)
        raise PatchError(
            "fastvlm.patch: model must contain a Florence-2, BART, mBART, M2M100, Marian, Pegasus, "
            "Blenderbot, TrOCR, Whisper, T5, Pix2Struct, GPT-2, BLIP, BERT, Gemma-2, T5Gemma, "
            "PaliGemma, Llama or Mllama decoder, or modules of that structure; got "
            f"{type(model).__name__}, in which nothing can be patched"
            f"{' (' + why + ')' if why else ''}"
        )
    if strict and report.skipped:
        skipped = _by_reason(report)
        raise PatchError(f"fastvlm.patch: strict is set and modules were skipped: {skipped}")
    for change in changes:
        if change.swap is not None:
            become(change.module, swapped(unpatched_class(change.module), change.swap))
            _PATCHED_BY.setdefault(change.module, WeakSet()).add(model)
    report.huge_bytes = pages.gather(streamed(changes))
    return report


# the models by which a module was patched: a copy may share its layers with its original
_PATCHED_BY: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def unpatch(model: nn.Module) -> None:
    """Take all of fastvlm out of a patched model; it is exactly as before.

    Layers that it shares with another patched model of which it is a copy (`copy.copy`,
    Accelerate's `compile_regions`) stay patched for that one: they compute for this one what they
    did.

    Where a part's forward was compiled (``m.forward = torch.compile(m.forward)``), all that
    torch.compile has compiled in this process is forgotten, and compiled again when it is called.

    Raises TypeError for what is no nn.Module, PatchError where a patched module's class was wrapped
    by another library since (then nothing is changed). A model that is not patched is left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvlm.unpatch: model must be a torch.nn.Module; got {type(model)!r}")
    compiled = False
    for name, module in model.named_modules():
        if not is_patched(module) and hasattr(type(module), "_fastvlm_base"):
            raise PatchError(
                f"fastvlm.unpatch: {name} was wrapped after patching by {type(module).__name__}; "
                "undo that first"
            )
        reason = own_forward(module) if is_patched(module) else None
        if reason is not None and holds_our_forward(module):
            raise PatchError(f"fastvlm.unpatch: {name}: {reason}; undo that first")
        compiled |= reason is not None
    elsewhere = _used_elsewhere(model)
    for module in model.modules():
        if is_patched(module) and module not in elsewhere:
            become(module, unpatched_class(module))
            _PATCHED_BY.pop(module, None)
    if compiled:  # no guard of torch.compile(model.forward) sees that a class has changed
        torch.compiler.reset()


def _used_elsewhere(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that other patched models have, neither parts of it nor wholes."""
    inside = set(model.modules())
    shared: set[nn.Module] = set()
    others = {owner for module in inside for owner in _PATCHED_BY.get(module, ())} - inside
    for owner in others:
        parts = set(owner.modules())
        if model not in parts:
            shared |= {m for m in parts & inside if owner in _PATCHED_BY.get(m, ())}
    for module in inside & shared:
        _PATCHED_BY[module].discard(model)
    return shared


@contextlib.contextmanager
def patched(
    model: nn.Module,
    *,
    only: Collection[str] | str | None = None,
    weights: str | None = None,
    compute: str | None = None,
    strict: bool = False,
) -> Iterator[Report]:
    """``with fastvlm.patched(model):`` patch inside the block only; yields the Report.

    Arguments and errors: as `patch`. A model that was patched before the block stays so after it.
    """
    before = {module: type(module) for module in model.modules() if is_patched(module)}
    report = patch(model, only=only, weights=weights, compute=compute, strict=strict)
    try:
        yield report
    finally:
        for module in model.modules():
            cls = before.get(module, unpatched_class(module))
            if is_patched(module) and type(module) is not cls:
                become(module, cls)
                if not is_patched(module):
                    _PATCHED_BY.pop(module, None)


def _by_reason(report: Report) -> str:
    """What was skipped: for each reason the first module, and how many there are besides."""
    names: dict[str | None, list[str]] = {}
    for entry in report.skipped:
        names.setdefault(entry.reason, []).append(entry.module)
    return "; ".join(
        f"{first}{f' and {len(more)} more' if more else ''}: {reason}"
        for reason, (first, *more) in names.items()
    )


def _wanted(only: Collection[str] | str | None) -> frozenset[str]:
    if only is None:
        return frozenset(FLOORS)
    names = frozenset([only] if isinstance(only, str) else only)
    if not names or not names <= set(FLOORS):
        allowed = ", ".join(repr(floor) for floor in FLOORS)
        raise ValueError(f"fastvlm.patch: only must name some of {allowed}; got {only!r}")
    return names
