"""How often Python asks a tensor for a value, or makes one of numbers: counted, on any machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastvlm.generate import ranking, searches

# what waits for a device, where the tensor lies on one
WAITS = {
    "tolist", "item", "cpu", "numpy", "nonzero", "equal", "unique", "masked_select", "__bool__",
    "__int__", "__float__", "__index__", "is_nonzero", "bincount", "__contains__",
}  # fmt: skip
# what makes a tensor of numbers of the host
COPIES = {"tensor", "as_tensor"}


class Counted(TorchFunctionMode):
    """Of the thread that enters it. found: "waits" and "copies", and each wait by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS:
            self.found["waits"] += 1
            self.found[name] += 1
        if name in COPIES and not (args and isinstance(args[0], torch.Tensor)):
            self.found["copies"] += 1
        return func(*args, **(kwargs or {}))


def leave_out_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams are ranked as on a GPU. Equal scores are put in order by PyTorch, of numbers that are
    on the host already."""
    top = searches._top

    def uncounted(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return top(*args)

    monkeypatch.setattr(searches, "_top", uncounted)
    monkeypatch.setattr(ranking, "_on_host", lambda device: False)
