"""Offsets beyond 2^31 elements, in the Triton kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import emulator
import pytest
import torch
from far import Far, far_tensors
from torch import Tensor

pytest.importorskip("triton")
from test_triton_mutants import Mutant, planted

from fastvlm import Layout, ops

pytestmark = pytest.mark.triton
BF16 = torch.bfloat16


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def _same_as_near(far: Far, op: Callable[..., Tensor], *near: Tensor) -> None:
    """The same numbers, and the same gradients, wherever the operands lie."""
    results = []
    for place in (lambda x: x, far.put):
        leaves = [place(x).detach().requires_grad_() for x in near]
        out = op(*leaves)
        torch.manual_seed(0)
        grad = torch.randn(out.shape).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def attention(far: Far) -> None:
    layout = Layout.from_lengths([3], [3], [0])
    q, k, v = _randn(3, 2, 16), _randn(3, 1, 16), _randn(3, 1, 16)
    _same_as_near(far, lambda *x: ops.cross_attention(*x, layout), q, k, v)


def cached(far: Far) -> None:
    q, k, v = _randn(3, 2, 16), _randn(3, 5, 1, 16), _randn(3, 5, 1, 16)
    lengths = torch.full((3,), 5)
    near = ops.cached_attention(q, k, v, lengths)
    assert torch.equal(ops.cached_attention(far.put(q), far.put(k), far.put(v), lengths), near)


def rms_norm(far: Far) -> None:
    weight = _randn(24)
    _same_as_near(far, lambda x: ops.rms_norm(x, weight), _randn(3, 24))


def layer_norm(far: Far) -> None:
    weight, bias = _randn(24), _randn(24)
    _same_as_near(
        far, lambda x, r: ops.residual_layer_norm(x, r, weight, bias), _randn(3, 24), _randn(3, 24)
    )


def loss(far: Far) -> None:
    labels = torch.tensor([39, 7, -100])
    _same_as_near(
        far,
        lambda h, w: ops.linear_cross_entropy(h, w, labels, softcap=5.0),  # type: ignore[arg-type,return-value]
        _randn(3, 24),
        _randn(40, 24),
    )


def mlp(far: Far) -> None:
    down = _randn(24, 40)
    _same_as_near(
        far,
        lambda x, gate, up: ops.geglu_mlp(x, gate, up, down),
        _randn(3, 24),
        _randn(40, 24),
        _randn(40, 24),
    )


CHECKS = {check.__name__: check for check in (attention, cached, rms_norm, layer_norm, loss, mlp)}


@pytest.fixture
def far() -> Iterator[Far]:
    with emulator.emulated(), far_tensors() as tensors:
        yield tensors


@pytest.mark.parametrize("name", list(CHECKS))
def test_operands_may_reach_beyond_2_31_elements(name: str, far: Far) -> None:
    CHECKS[name](far)


# offsets of 32 bits, planted: kernel file by launcher, the check that meets it
WRAPPED = [
    Mutant(check.__name__, check, launcher, file, old, old.replace(".to(tl.int64)", ""))
    for check, launcher, file, old in (
        (attention, "attention", "forward", "(first + place).to(tl.int64)"),
        (attention, "attention", "forward", "(key_start + key).to(tl.int64)"),
        (attention, "attention", "backward", "(key_start + key).to(tl.int64)"),
        (cached, "attention", "cached", "r = tl.program_id(0).to(tl.int64)"),
        (rms_norm, "norm", "kernels", "tl.program_id(0).to(tl.int64)"),
        (loss, "loss", "kernels", "vocabulary - 1).to(tl.int64)"),
        (mlp, "mlp", "kernels", "% n).to(tl.int64)"),
    )
]


@pytest.mark.parametrize("mutant", WRAPPED, ids=lambda m: f"{m.name}-{m.seen_as}")
def test_an_offset_of_32_bits_is_caught(
    mutant: Mutant, far: Far, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ttsem.sanitize import KernelFault

    planted(mutant, monkeypatch, tmp_path)
    with pytest.raises(KernelFault) as caught:
        mutant.check(far)
    assert caught.value.fault.kind in ("oob_read", "oob_write")
