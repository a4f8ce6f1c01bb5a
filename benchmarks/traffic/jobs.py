"""Whole jobs of a training step, forward and backward: Liger-Kernel's modules and our ops, counted.

``count`` starts a process with a device that is not there (`no_device`), because Liger asks whether
tensors are on "cuda" and takes slower ways where they are not. What it asks of the device's values
gets the answer of a plain step: all labels are in range, and the gradient of the loss is 1.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import GEMMA_2B
from benchmarks.traffic import counter, liger, no_device
from fastvlm import ops

M, N, HIDDEN, V = 4096, GEMMA_2B.width, GEMMA_2B.hidden, 256_000
HEADS, KV_HEADS, HEAD_DIM = GEMMA_2B.heads, GEMMA_2B.kv_heads, GEMMA_2B.head_dim
CAP, EPS = 30.0, 1e-6
OURS = "fastvlm"

Sizes = dict[str, int]


class Job(NamedTuple):
    """run: by side, the forward pass of the leaves, which get gradients; each side its own."""

    leaves: tuple[tuple[int, ...], ...]
    run: dict[str, Callable[..., tuple[Tensor, ...]]]


def sizes(**other: int) -> Sizes:
    """rows, width, hidden, vocabulary of the jobs."""
    return {"rows": M, "width": N, "hidden": HIDDEN, "vocabulary": V, **other}


class _Answers(TorchDispatchMode):
    """Questions about values of fake tensors are answered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            return 1
        return func(*args, **(kwargs or {}))


def _x(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=grad)


def _rms_norm(rows: int, width: int) -> Job:
    def theirs(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # as Liger's patch of Gemma-2 calls it
        return (LigerRMSNormFunction.apply(x, w, EPS, 1.0, "gemma", False),)

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (ops.rms_norm(x, w, eps=EPS, offset=1.0),)

    return Job(((rows, width), (width,)), {"LigerRMSNorm": theirs, OURS: ours})


def _rope(rows: int) -> Job:
    cos, sin = (_x(rows, HEAD_DIM, grad=False) for _ in range(2))

    def theirs(*leaves: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops.rope import LigerRopeFunction

        # [batch, heads, tokens, head_dim], as attention has them
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in leaves)
        return tuple(LigerRopeFunction.apply(q, k, cos.unsqueeze(0), sin.unsqueeze(0)))

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return ops.rope(q, k, cos, sin)

    leaves = (rows, HEADS, HEAD_DIM), (rows, KV_HEADS, HEAD_DIM)
    return Job(leaves, {"liger_rotary_pos_emb": theirs, OURS: ours})


def _geglu_mlp(rows: int, width: int, hidden: int) -> Job:
    def theirs(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        # LigerGEGLUMLP.forward
        product = LigerGELUMulFunction.apply(F.linear(x, gate), F.linear(x, up))
        return (F.linear(product, down),)

    def ours(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return (ops.geglu_mlp(x, gate, up, down),)

    leaves = (rows, width), (hidden, width), (hidden, width), (width, hidden)
    return Job(leaves, {"LigerGEGLUMLP": theirs, OURS: ours})


def _loss(rows: int, width: int, vocabulary: int) -> Job:
    labels = torch.empty(rows, dtype=torch.int64, device="cuda")

    def fused(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return (LigerFusedLinearCrossEntropyLoss(softcap=CAP)(weight, h, labels),)

    def apart(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return (LigerCrossEntropyLoss(softcap=CAP)(F.linear(h, weight), labels),)

    def ours(h: Tensor, weight: Tensor) -> tuple[Any, ...]:
        return (ops.linear_cross_entropy(h, weight, labels, softcap=CAP),)

    sides = {
        "LigerFusedLinearCrossEntropyLoss": fused,
        "linear, LigerCrossEntropyLoss": apart,
        OURS: ours,
    }
    return Job(((rows, width), (vocabulary, width)), sides)


def jobs(rows: int, width: int, hidden: int, vocabulary: int) -> dict[str, Job]:
    """By their names; inside `device` alone."""
    return {
        "RMSNorm": _rms_norm(rows, width),
        "RoPE of q and k": _rope(rows),
        "GeGLU MLP": _geglu_mlp(rows, width, hidden),
        "linear, softcap, cross entropy": _loss(rows, width, vocabulary),
    }


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Fake tensors on "cuda" whose values are answered."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def number(value: float, device: Any = "cpu") -> Tensor:
        return torch.full((), value, device=device)

    with (
        no_device.h100(),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Answers(),
        # of the thread of a backward pass, which does not know that there is no device
        mock.patch.object(torch, "tensor", number),
    ):
        yield


def _counted(job: Job, side: str) -> dict[str, Any]:
    leaves = [_x(*shape) for shape in job.leaves]
    found = {"forward": counter.Traffic(), "backward": counter.Traffic()}
    with counter.triton_launches(found["forward"], "liger."), found["forward"]:
        outs = job.run[side](*leaves)
    grads = [torch.empty_like(x) for x in outs]
    with counter.triton_launches(found["backward"], "liger."), found["backward"]:
        torch.autograd.grad(outs, leaves, grads)
    return {part: traffic.numbers() for part, traffic in found.items()}


def count(given: Sizes) -> list[dict[str, Any]]:
    """job, side, forward and backward (launches, bytes, kernels) of all; without Liger, of ours."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.traffic.jobs"], input=json.dumps(given),
        env=no_device.preloaded(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the jobs could not be counted:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    given, theirs = json.loads(sys.stdin.read()), liger.missing() is None
    with device():
        for name, job in jobs(**given).items():
            for side in job.run if theirs else [OURS]:
                found = {"job": name, "side": side, **_counted(job, side)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    no_device.leave()
