"""What the report of a patch says of a model as a whole, above the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastvlm.compat.versions import cross_cache_has_window
from fastvlm.models import t5gemma
from fastvlm.ops import dispatch
from fastvlm.patching.plan import Change
from fastvlm.patching.weights import compute_of, why_not_in


def notes_of(
    model: nn.Module, changes: list[Change], weights: str | None, compute: str | None
) -> list[str]:
    """What a reader of the report should know of the model as a whole."""
    from fastvlm.run.attention import left_out_softcaps

    convs = any(c.swap is not None and "bf16_conv2d" in c.swap.runs_on for c in changes)
    notes = [*_asked(weights, compute, convs), *_without_kernels(model)]
    notes += _unknown_stacks(model, changes)
    notes += [*left_out_softcaps(model), *_states_cut_short(model)]
    if compute is None:
        return notes
    linears = [c for c in changes if c.swap is not None and "linear" in c.swap.runs_on]
    names: dict[str, list[str]] = {}
    for change in linears:
        why = None if compute_of(change.swap) else why_not_in(compute, change.module)
        if why is not None:
            names.setdefault(why, []).append(change.name)
    for why, found in names.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        notes.append(f"{found[0]}{more}: {why}")
    return notes


def _asked(weights: str | None, compute: str | None, convs: bool) -> Iterator[str]:
    """convs: whether there are convolutions in that arithmetic."""
    if weights is not None:
        yield f'weights="{weights}": layers that a decoding step runs read them so'
    if compute is not None:
        from fastvlm.nn.compute import rounds_rows

        rows = "rounded to bfloat16" if rounds_rows(compute) else "quantized to int8"
        yield (
            f'compute="{compute}": in products of 65 rows and more the weights are {compute}, the '
            f"rows {rows}{'; convolutions of the vision tower are in bfloat16' if convs else ''}"
        )


def _unknown_stacks(model: nn.Module, changes: list[Change]) -> Iterator[str]:
    """Stacks of layers in which there is nothing that a report's entries name."""
    named, told = {id(change.module) for change in changes}, list[str]()
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        inside = list(stack.modules())
        if any(id(part) in named for part in inside) or not any(
            isinstance(part, nn.Linear) for part in inside
        ):
            continue
        if any(name.startswith(f"{outer}.") for outer in told):
            continue
        told.append(name)
        layers = f"{len(stack)} of {type(stack[0]).__name__}"
        yield f"{name} ({layers}) runs as transformers computes it: nothing in it is known"


# of a device the kernels that nearly every op has there
_KERNELS = {"cpu": "cpu", "cuda": "triton"}


def _without_kernels(model: nn.Module) -> list[str]:
    """Said of each device of a model whose kernels cannot run here."""
    notes = []
    for device in sorted({parameter.device.type for parameter in model.parameters()}):
        if device not in _KERNELS:
            continue
        why = dispatch.OPS["linear"].kernels[_KERNELS[device]].unavailable()
        if why is not None:
            notes.append(
                f"the kernels for {device} do not run here ({why.splitlines()[0].rstrip(':')}): "
                "PyTorch's operations serve in their place, more slowly; python -m fastvlm env "
                "says more"
            )
    return notes


def _states_cut_short(model: nn.Module) -> list[str]:
    """What a reader of the report should know of cross-attention whose own cache is too short."""
    if not cross_cache_has_window():
        return []
    cross = [m for m in model.modules() if t5gemma.is_cross_attention(m)]
    configs: Iterator[Any] = (getattr(module, "config", None) for module in cross)
    slides = (c for c in configs if "sliding_attention" in (getattr(c, "layer_types", None) or ()))
    windows = {config.sliding_window for config in slides}
    return [
        f"of more than {window} encoder states this transformers' cache keeps the last ones alone "
        "in layers of sliding attention, and its generate() fails or reads those; a patched one "
        "reads all, as transformers 5.10 does"
        for window in sorted(windows)
    ]
