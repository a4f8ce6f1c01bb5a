"""Whether a model gives patched what it gives unpatched: tokens, loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from exact import Float64
from torch import Tensor, nn

import fastvlm
from fastvlm.patching.classes import PatchError, is_patched

Batch = dict[str, Any]
LENGTH = 10
SEARCHES = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 3}}


def tokens(model: nn.Module, batch: Batch, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    lengths = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    return model.eval().generate(**batch, **{"no_repeat_ngram_size": 2, **lengths, **settings})


def _backward(model: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
    """The loss, and the gradient of each parameter that has one."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def exact(model: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    batch = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    with Float64():
        return _backward(model, batch, training)


def off(plain: dict[str, Tensor], ours: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """What breaks the error rule (2 x for the loss, 3 x for gradients), each with its sizes."""
    if plain.keys() != ours.keys():
        return [f"gradients of other parameters: {sorted(plain.keys() ^ ours.keys())}"]
    eps = torch.finfo(plain["loss"].dtype).eps
    # a gradient is rounded at the scale of what it is a sum of, not of what is left of that
    total = max(float(value.abs().max()) for name, value in right.items() if name != "loss")
    errors = {n: float((plain[n].double() - value).abs().max()) for n, value in right.items()}
    # a single number of PyTorch's (the gradient of a gate) may be right by luck, all are not
    single = {n for n, value in right.items() if value.numel() == 1 and n != "loss"}
    errors |= dict.fromkeys(single, max((errors[n] for n in single), default=0.0))
    found = []
    for name, value in right.items():
        times, scale = (2, float(value.abs().max())) if name == "loss" else (3, total)
        allowed = times * errors[name] + eps * scale
        error = float((ours[name].double() - value).abs().max())
        if not error <= allowed:
            found.append(f"{name}: {error:.3g} off, {allowed:.3g} allowed")
    return found


def differences(plain: nn.Module, ours: nn.Module, inputs: Batch, training: Batch) -> list[str]:
    """Where a patched model differs from the same one unpatched, in words; [] where nowhere."""
    found = []
    for name, search in SEARCHES.items() if inputs else ():
        want, got = (tokens(model, dict(inputs), **search) for model in (plain, ours))
        if not torch.equal(want, got):
            found.append(f"{name}: other tokens")
    for mode in (False, True) if training else ():
        right = exact(plain, training, mode)
        theirs, mine = (_backward(model, training, mode) for model in (plain, ours))
        broken = off(theirs, mine, right)
        found += [f"{'training' if mode else 'eval'}, {b}" for b in broken[:3]]
    return found


def tried(build: Callable[[], nn.Module]) -> tuple[nn.Module, fastvlm.Report | None, str]:
    """A patched model and its report, or one that was refused, None and the reason."""
    model = build()
    before = [type(module) for module in model.modules()]
    try:
        report = fastvlm.patch(model)
    except PatchError as error:
        assert before == [type(module) for module in model.modules()], "changed, and refused"
        assert not any(map(is_patched, model.modules()))
        return model, None, str(error)
    return model, report, ""
