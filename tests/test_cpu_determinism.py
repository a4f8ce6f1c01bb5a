"""CPU kernels: the same bits for any number of threads, and right in a data loader's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastvlm
from fastvlm import Layout, extension, ops

READERS = Layout.from_lengths([40, 0, 7, 133, 1, 1, 1], [165, 17, 64], [2, 0, 0, 2, 2, 1, 1])
SEGMENTS = Layout.from_lengths([5, 0, 1, 64, 150, 17])
DROPOUT = {"dropout_p": 0.2}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def few_rows(op: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Callable[[], Any]:
    """Without gradients, as a decoding step: products of many rows are a library's."""

    def run() -> Any:
        with torch.no_grad():
            return op(x, *rest, **kwargs)

    return run


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Each op's own kernels, forward and backward: sizes of several tasks, multiples of nothing."""
    n, m = READERS.num_tokens, READERS.num_kv_tokens
    t = SEGMENTS.num_tokens
    rows = [randn(700, 100), randn(700, 100), randn(100), randn(100)]
    cache = torch.randn(6, 600, 2, 64)
    cached_bias = torch.randn(4, 101)
    lengths = torch.tensor([600, 3, 77, 512, 0, 513])
    x, weight = randn(17, 300), randn(1001, 300)
    quantized = ops.quantize_rows(weight.detach())
    return {
        "cross_attention": (
            lambda q, k, v: ops.cross_attention(q, k, v, READERS, softcap=9.0, **DROPOUT),
            [randn(n, 4, 96), randn(m, 2, 96), randn(m, 2, 96)],
        ),
        "self_attention": (
            lambda q, k, v, b: ops.self_attention(
                *(q, k, v, SEGMENTS), window=40, position_bias=b, **DROPOUT
            ),
            [randn(t, 2, 64), randn(t, 2, 64), randn(t, 2, 64), randn(2, 41)],
        ),
        "cached_attention": (
            lambda q: ops.cached_attention(q, cache, cache, lengths, position_bias=cached_bias),
            [torch.randn(6, 4, 64)],
        ),
        "rms_norm": (ops.rms_norm, [rows[0], rows[2]]),
        "residual_rms_norm": (
            lambda x, r, w, n, g: ops.residual_rms_norm(x, r, w, gate=g, next_weight=n),
            [*rows, randn(1)],
        ),
        "residual_layer_norm": (
            lambda *x: ops.residual_layer_norm(*x, **DROPOUT),
            rows,
        ),
        "rope": (
            lambda q, k: ops.rope(q, k, torch.randn(t, 32), torch.randn(t, 32)),
            [randn(t, 9, 40), randn(t, 3, 40)],
        ),
        "linear": (few_rows(ops.linear, x, weight), []),
        "low_precision_linear": (few_rows(ops.low_precision_linear, x, *quantized), []),
        "gelu_mlp": (few_rows(ops.gelu_mlp, x, weight, None, randn(77, 1001), None), []),
        "geglu_mlp": (few_rows(ops.geglu_mlp, x, weight, weight, randn(77, 1001)), []),
        "linear_topk": (few_rows(ops.linear_topk, x, randn(9001, 300), 5, softcap=30.0), []),
        "linear_cross_entropy": (
            few_rows(ops.linear_cross_entropy, x, randn(9001, 300), torch.arange(17)),
            [],
        ),
    }


def results(function: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    torch.manual_seed(5)
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    wants = [o for o in outs if o.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(wants, leaves, [o.detach().sin() for o in wants]) if wants else ()
    return [o.detach() for o in outs] + list(grads)


@pytest.mark.parametrize("case", list(cases()))
def test_any_number_of_threads_gives_the_same_bits(
    case: str, threads: Callable[[int], None]
) -> None:
    function, inputs = cases()[case]
    torch.manual_seed(0)
    with fastvlm.use("cpu"):
        threads(1)
        expected = results(function, inputs)
        for count in (2, 7):
            threads(count)
            for got, want in zip(results(function, inputs), expected, strict=True):
                assert torch.equal(got, want), f"{count} threads"


class Items(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        torch.manual_seed(index)
        q, k = torch.randn(50, 2, 64), torch.randn(300, 2, 64)
        layout = Layout.from_lengths([20, 30], [300], [0, 0])
        return ops.rms_norm(ops.cross_attention(q, k, k, layout), torch.ones(64))


def test_kernels_run_in_forked_workers_of_a_data_loader() -> None:
    items = Items()
    expected = [items[i] for i in range(len(items))]  # the parent's threads are up before the fork
    loader = DataLoader(
        items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)
