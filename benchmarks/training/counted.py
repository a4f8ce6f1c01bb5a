"""``python -m benchmarks.training.counted``: one micro-batch of the true sizes, counted.

Launches, bytes, FLOPs of matrix products and peak activation memory of forward and backward of the
four Florenz models, frozen as published, in bfloat16: transformers eager on the padded batch, and
the patched model on the Triton path. Nothing is timed; tensors have shapes and no memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

import fastvlm
from benchmarks.traffic import counter
from benchmarks.training import workload
from fastvlm import layout as layouts
from fastvlm.env import versions
from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration, freeze_as_published
from fastvlm.florenz.sizes import SIZES
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent.parent / "results" / "training-counted.json"
_MASKS = "transformers.masking_utils"
IMAGES = 32  # of a micro-batch (paper, section 3)
SIDES = ("transformers", "fastvlm", "fastvlm, 6 targets")


class Step(counter.Traffic):
    """Also FLOPs, by operator, and the most bytes that are held at once beside the parameters."""

    def __init__(self, parameters: list[Tensor], pairs: dict[tuple[int, int], int]) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self.pairs = pairs
        self.known = {x.untyped_storage()._cdata for x in parameters}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name, formula = func._schema.name.split("::")[1], flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._work(name, formula(*args, **(kwargs or {}), out_val=result))
        self._work(f"fastvlm.{name}", products_of_loss(name, args, self.pairs[0, 0]))
        for x in counter.tensors_in(result):
            self._hold(x)
        return result

    def add(self, name: str, tensors: list[Tensor]) -> None:
        super().add(name, tensors)
        if name.startswith("fastvlm."):
            self._work(name, products_of(name.removeprefix("fastvlm."), tensors, self.pairs))

    def _work(self, name: str, flops: float) -> None:
        if flops:
            self.flops[name] = self.flops.get(name, 0) + flops

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.known or storage._cdata in self.held:
            return
        self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:  # perhaps: look which are gone
            self.held = {k: v for k, v in self.held.items() if not v[0].expired()}
            self.now = sum(size for _, size in self.held.values())
            self.peak = max(self.peak, self.now)


def products_of(kernel: str, x: list[Tensor], pairs: dict[tuple[int, int], int]) -> float:
    """FLOPs of the matrix products in one of our kernels, from the tensors it is given.

    pairs: (query rows, key rows) of a batch -> how many pairs of them meet.
    """
    if kernel in ("geglu_forward", "gelu_forward", "geglu_backward", "gelu_backward"):
        rows, inner = x[0].shape
        products = 2 if kernel == "geglu_forward" else 1
        width = x[1].shape[0] if kernel.endswith("forward") else x[1].shape[1]
        return 2.0 * products * rows * inner * width
    if kernel.startswith(("attention_forward", "attention_backward")):
        q, k = x[0], x[1]
        products = {"attention_forward": 2, "attention_backward_q": 3}.get(kernel, 4)
        return 2.0 * products * pairs[q.shape[0], k.shape[0]] * q.shape[1] * q.shape[2]
    return 0.0


def products_of_loss(name: str, args: tuple[Any, ...], labels: int) -> float:
    """The same of the loss, whose kernels run in chunks and skip the rows without a label."""
    if name == "linear_cross_entropy":
        products, (vocabulary, width) = 1, args[1].shape
    elif name == "linear_cross_entropy_backward":
        products, (vocabulary, width) = 1 + sum(args[-1][:2]), args[2].shape
    else:
        return 0.0
    return 2.0 * products * labels * vocabulary * width


def lengths_of(batch: dict[str, Tensor]) -> dict[str, list[int]]:
    return {
        "encoder": batch["attention_mask"].sum(1).tolist(),
        "decoder": (batch["labels"] != -100).sum(1).tolist(),
    }


@contextlib.contextmanager
def known_lengths(lengths: dict[str, list[int]], padded: dict[tuple[int, int], str]) -> Iterator:
    """Masks have no values here: what a Layout would read from one is told by its shape."""

    def from_mask(argument: str, mask: Tensor) -> tuple[list[int], layouts.Padding]:
        found = lengths[padded[tuple(mask.shape)]]
        index = torch.empty(sum(found), dtype=torch.int64, device=mask.device)
        return found, layouts.Padding(*mask.shape, index)

    with (
        mock.patch.object(layouts, "_from_mask", from_mask),
        # there is padding, so neither mask can be left out
        mock.patch(f"{_MASKS}._ignore_bidirectional_mask_sdpa", return_value=False),
        mock.patch(f"{_MASKS}._ignore_causal_mask_sdpa", return_value=False),
        mock.patch("fastvlm.florenz.model.torch_compilable_check"),
        mock.patch("fastvlm.florenz.readers.torch_compilable_check"),
    ):
        yield


def meeting(lengths: dict[str, list[int]], targets: int) -> dict[tuple[int, int], int]:
    """Pairs of rows in self-attention of both stacks and in cross-attention; labels at (0, 0)."""
    encoder, decoder = lengths["encoder"], lengths["decoder"]
    rows, keys = sum(decoder), sum(encoder)
    return {
        (keys, keys): sum(n * n for n in encoder),
        (rows, rows): sum(n * (n + 1) // 2 for n in decoder),
        (rows, keys): sum(n * m for n, m in zip(decoder, encoder)),
        (0, 0): rows,
    }


def count(size: str, side: str) -> dict[str, Any]:
    targets = 6 if side == SIDES[2] else 1
    real = FlorenzConfig.of_size(size)
    real._attn_implementation = "eager"
    batch = workload.batch(real, IMAGES, targets)
    lengths = lengths_of(batch)
    with torch.device(counter.DEVICE):
        model = FlorenzForConditionalGeneration(real).to(torch.bfloat16)
    freeze_as_published(model).train()
    if side != SIDES[0]:
        with torch.random.fork_rng():
            report = fastvlm.patch(model, only=("attention", "mlp", "norm", "linear", "loss"))
        assert not [e for e in report.skipped if "meta" in (e.reason or "")], report
    inputs = {
        name: x.to(counter.DEVICE, torch.bfloat16 if x.is_floating_point() else x.dtype)
        for name, x in batch.items()
    }
    shapes = {
        tuple(batch["attention_mask"].shape): "encoder",
        tuple(batch["labels"].shape): "decoder",
    }
    step = Step(list(model.parameters()), meeting(lengths, targets))
    with counter.as_on_cuda(), known_lengths(lengths, shapes), fastvlm.use("triton"), step:
        loss = model(**inputs).loss
        forward = step.total
        loss.backward()
    launches, moved = step.total
    return {
        "size": size,
        "side": side,
        **workload.tokens(batch),
        "launches": launches,
        "bytes": moved,
        "forward": {"launches": forward[0], "bytes": forward[1]},
        "flops": sum(step.flops.values()),
        "peak_activation_bytes": step.peak,
        "by_operator": {
            name: [step.launches[name], step.moved[name], step.flops.get(name, 0)]
            for name in sorted({*step.launches, *step.flops})
        },
    }


HEADER = (
    "model", "side", "targets", "launches", "GiB moved", "TFLOP", "GiB of activations",
    "GiB moved a target", "TFLOP a target",
)  # fmt: skip


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            r["size"],
            r["side"],
            str(r["targets"]),
            str(r["launches"]),
            f"{r['bytes'] / 2**30:.1f}",
            f"{r['flops'] / 1e12:.2f}",
            f"{r['peak_activation_bytes'] / 2**30:.2f}",
            f"{r['bytes'] / 2**30 / r['targets']:.2f}",
            f"{r['flops'] / 1e12 / r['targets']:.3f}",
        )
        for r in results
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.counted")
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    results = [count(size, side) for size in args.size for side in SIDES]
    print(text_table(HEADER, rows(results)))
    args.out.write_text(json.dumps({"versions": versions(), "counted": results}, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
