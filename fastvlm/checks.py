"""Refusals shared by all ops: every message names the argument, what was given and what is wanted.

Only shapes, dtypes, devices and Python numbers are looked at, never values of a tensor, so a
check costs no device-to-host sync and traces under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """A short text of what was given: shape, dtype and device of a tensor, or the value itself."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def fail(op: str, argument: str, wanted: str, given: object) -> ValueError:
    """The one form of message; the caller raises it."""
    return ValueError(f"fastvlm.{op}: {argument} must be {wanted}; got {describe(given)}")


def is_tensor(op: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"fastvlm.{op}: {name} must be a torch.Tensor; got {describe(value)}")


def is_float(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise fail(op, argument, "float32, bfloat16, float16 (or float64, reference only)", tensor)


def same_device(op: str, name: str, first: Tensor, **others: Tensor | None) -> None:
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise fail(op, argument, f"on the device of {name} ({first.device})", tensor)


def same_kind(op: str, name: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors on the device and in the dtype of the first."""
    same_device(op, name, first, **others)
    for argument, tensor in others.items():
        if tensor is not None and tensor.dtype != first.dtype:
            dtype = str(first.dtype).removeprefix("torch.")
            raise fail(op, argument, f"of the dtype of {name} ({dtype})", tensor)


def has_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """``None`` in shape stands for any size."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape)
    )
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise fail(op, argument, f"of shape [{text}]", tensor)


def softcap_value(op: str, softcap: float | None) -> float:
    """0.0 stands for no softcap inside the schemas."""
    if softcap is None:
        return 0.0
    if not isinstance(softcap, (int, float)) or not softcap > 0:
        raise fail(op, "softcap", "a number above 0, or None for no cap", softcap)
    return float(softcap)


def scale_value(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(max(head_dim, 1) ** -0.5)
    if not isinstance(scale, (int, float)):
        raise fail(op, "scale", "a number, or None for head_dim ** -0.5", scale)
    return float(scale)


def probability(op: str, argument: str, p: float) -> float:
    if not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise fail(op, argument, "in [0, 1)", p)
    return float(p)


def choice(op: str, argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise fail(op, argument, "one of " + ", ".join(repr(a) for a in allowed), value)
