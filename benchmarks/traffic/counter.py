"""A mode that counts what is done to tensors without memory (device "meta").

The rules, the same for every side of a table. A launch is a kernel that is started: an operator of
ATen that computes, a launch through Triton, a launch of the CUDA library. Its bytes are those of
the tensors that it is given and gives back, each once, but

- what is read and then written in place, twice;
- of a table that rows or elements are picked from, only as much as is picked;
- of a dimension of stride 0, which an expanded tensor has, one element.

Caches do not exist: what a kernel reads again, or reads after another has written it, counts there.
"""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
# operators whose first tensor is a table: as many of its elements are read as come out
_PICKS = {"embedding", "index_select", "index", "gather"}
# in place, without looking at what was there
_OVERWRITES = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_"}


def bytes_of(x: Tensor) -> int:
    """Of the elements there are: a dimension of stride 0 holds one."""
    sizes = [n for n, stride in zip(x.shape, x.stride()) if stride != 0 or n <= 1]
    return int(torch.Size(sizes).numel() * x.element_size())


def tensors_in(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _moved(name: str, given: list[Tensor], result: list[Tensor], out: Any = None) -> int:
    """The bytes of one launch of an ATen operator; out: what was asked to take the result."""
    total = sum(bytes_of(x) for x in {id(x): x for x in [*given, *result]}.values())
    if name in _PICKS:
        table, picked = given[0], sum(x.numel() for x in result)
        total -= max(0, bytes_of(table) - picked * table.element_size())
    elif name.endswith("_") and name not in _OVERWRITES:
        total += bytes_of(given[0])
    elif any(x is out for x in given):
        total += bytes_of(out)
    return total


def _touched(function: Any) -> dict[str, set[str]]:
    """Which parameters of a Triton kernel it loads and stores, by itself or in what it calls."""
    from triton.runtime.jit import JITFunction

    found: dict[str, set[str]] = {"load": set(), "store": set()}
    calls = [n for n in ast.walk(ast.parse(function.src)) if isinstance(n, ast.Call)]
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr in found and call.args:
            first = call.args[0]
            while isinstance(first, ast.BinOp):
                first = first.left
            if isinstance(first, ast.Name):
                found[call.func.attr].add(first.id)
        elif isinstance(call.func, ast.Name):
            helper = function.fn.__globals__.get(call.func.id)
            if isinstance(helper, JITFunction) and helper is not function:
                inside = _touched(helper)
                for name, x in zip(helper.arg_names, call.args):
                    for kind in found:
                        if isinstance(x, ast.Name) and name in inside[kind]:
                            found[kind].add(x.id)
    return found


def rewritten(function: Any, given: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
    """Of a Triton kernel's tensors those that it both loads and stores."""
    touched = _touched(function)
    both = touched["load"] & touched["store"]
    arguments = {**dict(zip(function.arg_names, given)), **named}
    return [x for name, x in arguments.items() if name in both and isinstance(x, Tensor)]


class Traffic(TorchDispatchMode):
    """launches and moved (bytes), by operator; the names of our kernels start with "fastvlm.".

    backends: which of ours may serve, as they would on a GPU that has them.
    """

    def __init__(self, backends: Sequence[str] = ("triton",)) -> None:
        super().__init__()
        self.backends = backends
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def launch(self, name: str, moved: int) -> None:
        self.launches[name] += 1
        self.moved[name] += moved

    def add(self, name: str, tensors: list[Tensor]) -> None:
        """One launch that reads or writes each of these."""
        self.launch(name, sum(bytes_of(x) for x in tensors))

    @property
    def total(self) -> tuple[int, int]:
        return sum(self.launches.values()), sum(self.moved.values())

    def numbers(self) -> dict[str, Any]:
        """What a results file keeps: launches, bytes, and both by kernel."""
        launches, moved = self.total
        kernels = {k: [n, self.moved[k]] for k, n in sorted(self.launches.items())}
        return {"launches": launches, "bytes": moved, "kernels": kernels}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastvlm":
            return self._ours(name, args)
        result = func(*args, **kwargs)
        if namespace != "prim" and name not in _VIEWS:
            out = kwargs.get("out")
            given = tensors_in(args, {k: x for k, x in kwargs.items() if k != "out"})
            made = tensors_in(result, out)
            # what the host computes for itself is no launch
            if any(x.device.type != "cpu" for x in (*given, *made)):
                self.launch(name, _moved(name, given, made, out))
        return result

    def _ours(self, name: str, args: tuple[Any, ...]) -> Any:
        """The launcher itself; its kernels are counted where they would be launched."""
        from benchmarks.traffic.cuda_launches import CudaLaunches

        run = self._server(name, args)
        with triton_launches(self, "fastvlm."), CudaLaunches(self).installed(), self:
            return run(*args)

    def _server(self, name: str, args: tuple[Any, ...]) -> Any:
        """As dispatch chooses on CUDA, among the backends of this count."""
        op, yielding = dispatch.OPS[name], None
        for backend in dispatch.CANDIDATES["CUDA"]:
            kernel = op.kernels.get(backend)
            if kernel is None or backend not in self.backends or kernel.unsupported(*args):
                continue
            if kernel.yields is None or kernel.yields(*args) is None:
                return kernel.run
            yielding = yielding or kernel
        # the reference serves on a GPU too, operator by operator
        return op.reference if yielding is None else yielding.run


@contextlib.contextmanager
def triton_launches(traffic: Traffic, prefix: str) -> Iterator[None]:
    """Inside, what Triton would launch is counted in its place."""
    from triton.runtime.jit import JITFunction

    def run(function: Any, *given: Any, **named: Any) -> None:
        tensors = tensors_in(given, named) + rewritten(function, given, named)
        traffic.add(prefix + function.fn.__name__, tensors)

    with mock.patch.object(JITFunction, "run", run):
        yield


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
