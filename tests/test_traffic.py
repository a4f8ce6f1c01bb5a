"""The counts of launches and bytes: by hand where they can be, and every side of the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cuda_emulator
import pytest
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cases import Decoder
from benchmarks.traffic import __main__ as traffic
from benchmarks.traffic import compiled, counter, inputs, jobs, layers, liger, no_device, tables
from fastvlm import Layout, ops
from fastvlm.cuda import attention
from fastvlm.florenz import FlorenzConfig

TRAINING = inputs.Training((7, 3, 5), (20, 11, 16), 7, 20)
DECODING = inputs.Decoding(images=2, beams=2, keys=20, filled=9)
FLORENCE = Decoder("tiny-florence", 128, 2, 2, 64, 256)
GEMMA = Decoder("tiny-gemma", 128, 2, 1, 64, 256, gated=True, softcap=50.0)

needs_compiler = pytest.mark.skipif(
    no_device.missing() is not None, reason=f"no device to generate code for: {no_device.missing()}"
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton here")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(run: Callable[[], Any], *backends: str) -> counter.Traffic:
    with counter.Traffic(backends) as found:
        run()
    return found


N = 2 * 8 * 16  # bytes of [8, 16]


@pytest.mark.parametrize(
    ("launches", "moved", "run"),
    [
        (1, 3 * N, lambda: meta(8, 16) + meta(8, 16)),
        (1, 2 * N + 2 * 16, lambda: meta(8, 16) + meta(16)),
        (1, 2 * N + 2, lambda: meta(8, 16) * meta(1).expand(16)),
        (1, 3 * N, lambda: meta(8, 16).mul_(meta(8, 16))),
        (1, 2 * N, lambda: meta(8, 16).copy_(meta(8, 16))),
        (1, N, lambda: meta(8, 16).zero_()),
        (1, 3 * N, lambda: torch.add(meta(8, 16), meta(8, 16), out=meta(8, 16))),
        (1, 3 * N, lambda: (lambda x: torch.add(x, meta(8, 16), out=x))(meta(8, 16))),
        (0, 0, lambda: meta(8, 16).t()[1:].unsqueeze(0)),
        (1, 8 * 4 + 2 * 4 * 32, lambda: meta(5000, 16)[meta(4, dtype=torch.int64)]),
        (1, 2 * (8 * 4 + 4 * 12 + 8 * 12), lambda: meta(8, 4) @ meta(4, 12)),
        (0, 0, lambda: torch.ones(8) + torch.ones(8)),
    ],
)  # fmt: skip
def test_operators_by_hand(launches: int, moved: int, run: Callable[[], Any]) -> None:
    assert counted(run).total == (launches, moved)


@needs_triton
def test_kernels_by_hand() -> None:
    x, w = meta(8, 256), meta(256)
    layout = Layout.from_lengths([8]).to("meta")
    q = meta(8, 2, 64)
    with torch.no_grad():
        assert counted(lambda: ops.rms_norm(x, w), "triton").total == (1, 2 * (2 * 8 * 256 + 256))
        found = counted(lambda: ops.self_attention(q, q, q, layout), "triton")
        assert found.launches == {"fastvlm.attention_forward": 1}
        # a backend that is not there does not serve
        assert counted(lambda: ops.rms_norm(x, w)).total[0] > 1


@needs_triton
def test_what_a_kernel_rewrites_counts_twice() -> None:
    from fastvlm.triton.kernels import loss_backward

    # in a function that it calls
    kernel = loss_backward.cross_entropy_dh
    given = {name: meta(1) for name in kernel.arg_names}
    for positional in (0, 3, len(given)):
        named = dict(list(given.items())[positional:])
        found = counter.rewritten(kernel, list(given.values())[:positional], named)
        assert [id(x) for x in found] == [id(given["SUMS"])]


def _cuda_cases() -> dict[str, Callable[[Callable[..., Tensor], str], Any]]:
    def cross(make: Callable[..., Tensor], device: str) -> Any:
        layout = Layout.for_beams(2, 3, [70, 70]).to(device)
        return ops.cross_attention(make(6, 4, 64), make(140, 2, 64), make(140, 2, 64), layout)

    def cached(make: Callable[..., Tensor], device: str) -> Any:
        lengths = torch.full((3,), 70, dtype=torch.int32, device=device)
        return ops.cached_attention(make(3, 4, 64), make(3, 70, 2, 64), make(3, 70, 2, 64), lengths)

    return {
        "cross": cross,
        "cached": cached,
        "geglu": lambda make, _: ops.geglu_mlp(
            make(3, 64), make(32, 64), make(32, 64), make(64, 32)
        ),
        "gelu": lambda make, _: ops.gelu_mlp(
            make(3, 64), make(32, 64), make(32), make(64, 32), make(64)
        ),
        "stored": lambda make, _: ops.low_precision_linear(make(3, 64), make(32, 64)),
        "topk": lambda make, _: ops.linear_topk(make(3, 64), make(300, 64), 4, softcap=30.0),
        "rms": lambda make, _: ops.rms_norm(make(3, 64), make(64)),
        "tail": lambda make, _: ops.residual_rms_norm(
            make(3, 64), make(3, 64), make(64), next_weight=make(64)
        ),
        "layer norm": lambda make, _: ops.residual_layer_norm(
            make(3, 64), make(3, 64), make(64), make(64)
        ),
    }


@pytest.mark.slow
@pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", list(_cuda_cases()))
def test_the_cuda_library_launches_what_is_counted(
    name: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_splits", lambda *args: splits)
    run = _cuda_cases()[name]
    with torch.no_grad():
        found = counted(lambda: run(meta, "meta"), "cuda")
        with cuda_emulator.emulated():
            cuda_emulator.reset_counts()
            run(lambda *shape: torch.ones(shape, dtype=torch.bfloat16), "cpu")
    # beside what makes the inputs
    ours = {kernel: n for kernel, n in found.launches.items() if kernel.startswith("fastvlm.")}
    assert all(kernel.startswith("fastvlm.cuda.") for kernel in ours)
    assert sum(ours.values()) == cuda_emulator.counts()["launches"]


# what the compiler makes of functions that can be counted by hand, [rows, columns] of 2 bytes each
BY_HAND = """
import json, torch, torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks.traffic import inductor

def x(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)

def count(function, *args):
    with inductor.counted() as found:
        out = torch.compile(function, dynamic=False)(*args)
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return [found.graphs, *found.forward.total, *found.backward.total]

def broken(a):
    a = a * 2
    torch._dynamo.graph_break()
    return a + 1

with FakeTensorMode(allow_non_fake_inputs=True):
    ids = x(16, dtype=torch.int64)
    print(json.dumps({
        "pointwise": count(lambda a, b: (a * 2 + b).tanh() * b, x(128, 64), x(128, 64)),
        "broadcast": count(lambda a, b: a * b, x(128, 64), x(64)),
        "reduction": count(lambda a: a.float().sum(-1), x(128, 64)),
        "rows of a table": count(lambda t, i: t[i] * 2, x(5000, 64), ids),
        "part of a tensor": count(lambda a: a[:, :32] * 2, x(128, 64)),
        "in place": count(lambda a: a.mul_(2), x(128, 64)),
        "product": count(lambda a, w, b: F.gelu(a @ w + b),
                         x(128, 64, grad=True), x(64, 256, grad=True), x(256, grad=True)),
        "broken": count(broken, x(128, 64)),
    }))
"""


def _preloaded(code: str) -> Any:
    code += "from benchmarks.traffic import no_device\nno_device.leave()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=no_device.preloaded(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@needs_compiler
def test_generated_code_by_hand() -> None:
    found = _preloaded(BY_HAND)
    a, w, out = 2 * 128 * 64, 2 * 64 * 256, 2 * 128 * 256
    assert found["pointwise"] == [1, 1, 3 * a, 0, 0]
    assert found["broadcast"] == [1, 1, 2 * a + 2 * 64, 0, 0]
    assert found["reduction"] == [1, 1, a + 4 * 128, 0, 0]
    assert found["rows of a table"] == [1, 1, 8 * 16 + 2 * (2 * 16 * 64), 0, 0]
    assert found["part of a tensor"] == [1, 1, a, 0, 0]
    assert found["in place"] == [1, 1, 2 * a, 0, 0]
    assert found["broken"] == [2, 2, 4 * a, 0, 0]
    # the product by the library, its epilogue in a kernel; backward: the epilogue with the sum for
    # the bias, which writes over the gradient it is given or makes one, and two products
    forward = (a + w + out) + (2 * out + 2 * 256)
    backward = (3 * out + 2 * 256 + 2 * 256) + 2 * (a + w + out)
    assert found["product"] == [2, 2, forward, 3, backward]


@pytest.mark.slow
@needs_compiler
def test_whole_jobs_by_hand() -> None:
    rows, width, hidden, vocabulary = 256, 64, 128, 1024
    given = jobs.sizes(rows=rows, width=width, hidden=hidden, vocabulary=vocabulary)
    found = {(r["job"], r["side"]): r for r in jobs.count(given)}
    assert {job for job, side in found if side == jobs.OURS} == {job for job, _ in found}
    x, w, f = 2 * rows * width, 2 * width * hidden, 2 * rows * hidden

    def numbers(job: str, side: str) -> list[tuple[int, int]]:
        return [tables.total(found[job, side][part]) for part in tables.PARTS]

    assert numbers("RMSNorm", jobs.OURS)[0] == (1, 2 * x + 2 * width)
    ours = (2, (x + 2 * w + 3 * f) + (f + w + x))
    # each of its gradients: one product; of x a second one, which adds to it
    back = (6, (x + w + 5 * f) + 4 * (x + w + f) + (f + w + 2 * x))
    assert numbers("GeGLU MLP", jobs.OURS) == [ours, back]
    assert all(r[part]["launches"] for r in found.values() for part in tables.PARTS)
    if liger.missing():
        assert {side for _, side in found} == {jobs.OURS}
        return
    theirs = (4, 3 * (x + w + f) + 3 * f)
    back = (8, 6 * (x + w + f) + 5 * f + 3 * x)
    assert numbers("GeGLU MLP", "LigerGEGLUMLP") == [theirs, back]
    # as many rows at a time as make chunks of logits no larger than h, and the weight's gradient
    # is read and written for each
    chunks, v = rows // 16, 2 * vocabulary * width
    kernels = found["linear, softcap, cross entropy", "LigerFusedLinearCrossEntropyLoss"]
    launches, moved = kernels["forward"]["kernels"]["addmm"]
    assert (launches, moved) == (chunks, chunks * 2 * v + x + 2 * rows * vocabulary)


@pytest.mark.parametrize("d", [FLORENCE, GEMMA], ids=lambda d: d.name)
@pytest.mark.parametrize("side", ["transformers", "Liger", "fastvlm"])
@needs_triton
def test_a_layer_of_each_side(d: Decoder, side: str) -> None:
    if side == "Liger" and (reason := liger.missing()):
        record = traffic.count_layer(d, side, TRAINING)
        assert record["missing"] == reason
        pytest.skip(reason)
    trained, decoded = (traffic.count_layer(d, side, work) for work in (TRAINING, DECODING))
    assert trained["backward"]["launches"] > trained["forward"]["launches"]
    # each weight is read once, and its gradient written, at least
    with torch.device("meta"):
        weights = sum(p.numel() for p in layers.layer_of(d).parameters() if p.dim() > 1)
    assert trained["forward"]["bytes"] > 2 * weights
    assert trained["backward"]["bytes"] > 4 * weights
    assert decoded["forward"]["launches"] > 0
    kernels = {k for part in ("forward", "backward") for k in trained[part]["kernels"]}
    prefix = {"transformers": "", "Liger": "liger.", "fastvlm": "fastvlm."}[side]
    ours = {k for k in kernels if "." in k}
    assert all(k.startswith(prefix) for k in ours)
    assert bool(ours) == (side != "transformers")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_layer_and_step() -> None:
    config = FlorenzConfig.reduced("3.5B", width=64, vocab_size=1000)
    jobs = [
        compiled.layer_job(FLORENCE, TRAINING),
        compiled.layer_job(GEMMA, DECODING),
        compiled.step_job(config, DECODING),
    ]
    trained, decoded, step = compiled.count(jobs)
    plain = traffic.count_layer(FLORENCE, "transformers", TRAINING)
    for part in ("forward", "backward"):
        assert trained[part]["launches"] < plain[part]["launches"]
        assert trained[part]["bytes"] < plain[part]["bytes"]
    # the products are the same on both sides
    products = {"mm", "addmm"}
    theirs = traffic.count_layer(GEMMA, "transformers", DECODING)["forward"]["kernels"]
    assert decoded["forward"]["kernels"]["mm"][0] == theirs["mm"][0]
    assert products & set(step["forward"]["kernels"])
    assert [found["breaks"] for found in (trained, decoded, step)] == [{}, {}, {}]
    assert [found["graphs"] for found in (trained, decoded, step)] == [2, 1, 1]


@needs_triton
@pytest.mark.parametrize("size", ["0.4B", "3.5B"])
def test_a_step_of_each_side(size: str) -> None:
    # a head dimension that the CUDA kernels have
    config = FlorenzConfig.reduced(size, width=256 if size == "0.4B" else 128, vocab_size=1000)
    found = {
        side: traffic.count_step(size, config, side, DECODING)
        for side in tables.STEP_SIDES
        if side != compiled.SIDE
    }
    plain, ours = found["transformers"], found[tables.TRITON]
    assert tables.whole(ours) < tables.whole(plain)
    assert not any(k.startswith("fastvlm") for k in plain["head"]["kernels"])
    for part in ("launches", "bytes"):  # generate() ranks
        assert ours["head"][part] < plain["head"][part]
    kernels = ours["head"]["kernels"]
    assert sum(moved for k, (_, moved) in kernels.items() if not k.startswith("fastvlm")) < 10_000
    # beams change places in one table for all layers, and in every cache of transformers
    assert ours["reorder"]["launches"] < plain["reorder"]["launches"] == 4 * 2
    used = found[tables.CUDA]["stack"]["kernels"]
    assert {"fastvlm.cuda.cross_attention", "fastvlm.cuda.cached_attention"} <= set(used)
    assert not any(k.startswith("fastvlm.cuda") for k in ours["stack"]["kernels"])


def test_tables_say_who_has_the_fewest() -> None:
    numbers = [{"launches": n, "bytes": b, "kernels": {}} for n, b in ((9, 4 << 20), (5, 8 << 20))]
    records = [
        {"model": "m", "kind": "decoding", "side": "transformers", "forward": numbers[0]},
        {"model": "m", "kind": "decoding", "side": "fastvlm", "forward": numbers[1]},
        {"model": "m", "kind": "decoding", "side": "Liger", "missing": "not here"},
    ]
    (row,) = tables.layer_rows(records)
    assert row[-1] == "launches: fastvlm; bytes: transformers"
    assert dict(zip(tables.LAYER_HEADERS, row))["launches, Liger"] == "-"
    figures = {"counted": records, "steps": []}
    assert tables.notes(figures) == ["m, decoding, Liger: not counted: not here"]


def test_what_is_not_counted_again_is_kept(tmp_path: Path) -> None:
    def record(model: str, side: str, launches: int) -> dict[str, Any]:
        numbers = {"launches": launches, "bytes": 1, "kernels": {}}
        return {"model": model, "kind": "decoding", "side": side, "forward": numbers}

    path, same = tmp_path / "traffic.json", {"versions": {"torch": "1"}, "step": {}, "steps": []}
    old = [record("gemma2-2b", "fastvlm", 5), record("florence2-base", "torch.compile", 7)]
    path.write_text(json.dumps({**same, "counted": old}))
    new = [record("gemma2-2b", "fastvlm", 4), record("florence2-base", "transformers", 9)]
    merged = traffic.kept(path, {**same, "counted": new})["counted"]
    assert merged == [new[1], old[1], new[0]]
    with pytest.raises(ValueError, match="versions are others"):
        traffic.kept(path, {**same, "versions": {"torch": "2"}, "counted": new})


def test_the_report_has_the_counts(tmp_path: Path) -> None:
    kept = report.RESULTS / "traffic.json"
    (tmp_path / "traffic.json").write_text(kept.read_text())
    page = report.write(tmp_path).read_text()
    figures = json.loads(kept.read_text())
    for row in (*tables.layer_rows(figures["counted"]), *tables.step_rows(figures["steps"])):
        assert " | ".join(row) in page
