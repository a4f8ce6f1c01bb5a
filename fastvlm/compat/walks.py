"""Who walks through a model's output: wrappers on its way to the user, or the user.

torch 2.10 to 2.14 (DistributedDataParallel, pytree), accelerate 1.0 to 1.15. Where a name has
changed the walk counts as the user's, who gets tensors: slower, never wrong.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

_WALKERS = ("torch.nn.parallel.", "torch.distributed.", "torch.utils._pytree", "torch._")


def _caller(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_name.startswith("<"):
        frame = frame.f_back  # a comprehension, before Python 3.12 a frame of its own
    return frame


def is_wrappers(frame: FrameType | None) -> bool:
    """Whether this frame, of whoever asks for an output's values or items, belongs to a wrapper
    that looks for tensors, or converts them, while the call is still running."""
    frame = _caller(frame)
    if frame is None:
        return False
    module: str = frame.f_globals.get("__name__", "")
    if module == "transformers.utils.generic" and frame.f_code.co_name == "_model_output_flatten":
        return True
    if module == "accelerate.utils.operations":
        func: Any = frame.f_locals.get("func")
        return getattr(func, "__name__", None) == "_convert_to_fp32"
    return module.startswith(_WALKERS)
