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
_DRAWS = 6  # of weights, where one breaks the error rule
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


Results = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]  # theirs, ours, exact


def off(*each: Results) -> list[str]:
    """What breaks the error rule (2 x for the loss, 3 x for gradients) in the worst of each, with
    its sizes."""
    for plain, ours, _ in each:
        if plain.keys() != ours.keys():
            return [f"gradients of other parameters: {sorted(plain.keys() ^ ours.keys())}"]
    theirs, mine = ([_errors(one[side], one[2]) for one in each] for side in (0, 1))
    eps = torch.finfo(each[0][0]["loss"].dtype).eps
    sizes = [{n: float(value.abs().max()) for n, value in right.items()} for _, _, right in each]
    # a gradient is rounded at the scale of what it is a sum of, not of what is left of that
    total = max(size for found in sizes for name, size in found.items() if name != "loss")
    errors = {name: max(found[name] for found in theirs) for name in theirs[0]}
    # a single number of PyTorch's (the gradient of a gate) may be right by luck, all are not
    single = {n for n, value in each[0][2].items() if value.numel() == 1 and n != "loss"}
    errors |= dict.fromkeys(single, max((errors[n] for n in single), default=0.0))
    found = []
    for name in errors:
        times, scale = (2, max(size["loss"] for size in sizes)) if name == "loss" else (3, total)
        allowed = times * errors[name] + eps * scale
        error = max(one[name] for one in mine)
        if not error <= allowed:
            found.append(f"{name}: {error:.3g} off, {allowed:.3g} allowed")
    return found


def _errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((found[n].double() - value).abs().max()) for n, value in right.items()}


def _broken(plain: nn.Module, ours: nn.Module, batch: Batch, training: bool) -> list[str]:
    """What breaks the error rule with these weights and, since PyTorch may be right by luck with
    them, in the worst of several draws around them too."""

    def results() -> Results:
        right = exact(plain, batch, training)
        return *(_backward(model, batch, training) for model in (plain, ours)), right  # type: ignore[return-value]

    first = results()
    if not off(first):
        return []
    each = [first]
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    for seed in range(_DRAWS):
        for model in (plain, ours):
            _draw_around(model, before, seed)
        each.append(results())
    for model in (plain, ours):
        _draw_around(model, before, None)
    return off(*each)


def _draw_around(model: nn.Module, weights: list[Tensor], seed: int | None) -> None:
    """Weights a hundredth to either side; None: themselves."""
    generator = torch.Generator()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
            if seed is not None:
                generator.manual_seed(seed)
                parameter.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator))


def differences(plain: nn.Module, ours: nn.Module, inputs: Batch, training: Batch) -> list[str]:
    """Where a patched model differs from the same one unpatched, in words; [] where nowhere."""
    found = []
    for name, search in SEARCHES.items() if inputs else ():
        want, got = (tokens(model, dict(inputs), **search) for model in (plain, ours))
        if not torch.equal(want, got):
            found.append(f"{name}: other tokens")
    for mode in (False, True) if training else ():
        broken = _broken(plain, ours, training, mode)
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
