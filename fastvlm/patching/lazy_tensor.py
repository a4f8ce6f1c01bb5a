"""An object that stands for a tensor that is not computed unless somebody needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyTensor:
    """What it cannot answer by itself, the computed tensor does: subclasses say what they can."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> torch.Size: ...

    def tensor(self) -> Tensor:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def materialize(x: Any) -> Any:
    """x, or the tensor that it stands for."""
    return x.tensor() if isinstance(x, LazyTensor) else x


def _operator(name: str) -> Callable[..., Any]:
    def answer(self: LazyTensor, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(materialize, args))

    return answer


# Python looks these up on the class
for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs",
    "lt", "le", "gt", "ge", "eq", "ne", "getitem", "iter",
):  # fmt: skip
    setattr(LazyTensor, f"__{_name}__", _operator(f"__{_name}__"))
LazyTensor.__hash__ = object.__hash__  # type: ignore[method-assign]
