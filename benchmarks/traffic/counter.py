"""A mode that counts what is done to tensors without memory (device "meta")."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvlm.ops import dispatch

DEVICE = "meta"

# operators that only look at memory in another way, or reserve some
_VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze",
    "expand", "slice", "select", "detach", "alias", "as_strided", "split", "split_with_sizes",
    "chunk", "unbind", "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "unflatten", "diagonal", "view_as",
}  # fmt: skip


def _bytes(x: Tensor) -> int:
    """Of the elements there are: a dimension of stride 0 holds one."""
    sizes = [n for n, stride in zip(x.shape, x.stride()) if stride != 0 or n <= 1]
    return int(torch.Size(sizes).numel() * x.element_size())


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Traffic(TorchDispatchMode):
    """launches and moved (bytes), by operator; the names of our kernels start with "fastvlm."."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def add(self, name: str, tensors: list[Tensor]) -> None:
        once = {id(x): x for x in tensors}
        self.launches[name] += 1
        self.moved[name] += sum(_bytes(x) for x in once.values())

    @property
    def total(self) -> tuple[int, int]:
        return sum(self.launches.values()), sum(self.moved.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastvlm":
            return self._ours(name, args)
        result = func(*args, **kwargs)
        if namespace != "prim" and name not in _VIEWS:
            self.add(name, _tensors(args, kwargs, result))
        return result

    def _ours(self, name: str, args: tuple[Any, ...]) -> Any:
        """The Triton launcher itself; its kernels are counted where they would be launched."""
        from triton.runtime.jit import JITFunction

        kernel = dispatch.OPS[name].kernels.get("triton")
        if kernel is None or kernel.unsupported(*args) is not None:
            # what serves on a GPU too, operator by operator
            with self:
                return dispatch.OPS[name].reference(*args)

        def run(function: Any, *given: Any, **named: Any) -> None:
            self.add(f"fastvlm.{function.fn.__name__}", _tensors(given, named))

        with mock.patch.object(JITFunction, "run", run), self:
            return kernel.run(*args)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """PyTorch's dropout and attention are one kernel each on CUDA, and several operators on a
    device that it knows less of."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p > 0 else x

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out: Tensor = efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return out

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "dropout", dropout),
        mock.patch.object(functional, "scaled_dot_product_attention", attention),
    ):
        yield
