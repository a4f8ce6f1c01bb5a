"""A model of transformers in float64 throughout: what the error rule measures from.

Its classes round to float32 in places whatever the type of the weights (norms, rotations, softmax);
in this mode what asks for float32 gets float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class Float64(TorchFunctionMode):
    """Within it, no float narrower than float64 is made of another or from scratch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func is torch.finfo:
            return func(*args, **kwargs)
        return func(*(_wide(arg) for arg in args), **kwargs)
