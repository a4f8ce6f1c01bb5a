"""A model's copy in float64, where memory allows one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.checking.calls import Runner
from fastvlm.checking.sides import Float64

# what activations may take beside weights and gradients, as a share of those
_ACTIVATIONS = 0.5


class Exact:
    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._kind = next(runner.model.parameters()).device.type

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with torch.autocast(self._kind, enabled=False), Float64():
            yield


def exact_copy(runner: Runner, train: bool) -> Exact | str:
    """runner's model, which is unpatched, and its calls in float64; or why there is none."""
    model: nn.Module = runner.model
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if train else 0
    need = int(8 * (numbers + trained) * (1 + _ACTIVATIONS))
    free = _free(next(model.parameters()).device)
    if free is not None and need > free:
        return f"float64 needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    try:
        wide = copy.deepcopy(model).double()
    except Exception as error:  # quantized weights, a hook that cannot be copied
        return f"no copy in float64 can be made ({type(error).__name__}: {error})"
    widened = copy.copy(runner.calls)
    for name in ("batch", "forward", "labelled"):
        setattr(widened, name, _wide(getattr(runner.calls, name)))
    return Exact(Runner(wide, widened, runner.modes))


def _wide(batch: dict[str, Any] | None) -> dict[str, Any] | None:
    if batch is None:
        return None
    return {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in batch.items()
    }


def _free(device: torch.device) -> int | None:
    """Bytes; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None
