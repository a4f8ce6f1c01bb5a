"""Every kind of benchmark once with a tiny shape: its sides agree, baselines included."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# the benchmarks are not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastvlm
from benchmarks import cases, engines, gpu_baselines, kinds, measure, memory
from benchmarks.micro import test_attention as attention
from benchmarks.micro import test_attention_training as training
from benchmarks.micro import test_linear as linear
from benchmarks.micro import test_loss as loss
from benchmarks.micro import test_mlp as mlp
from benchmarks.micro import test_norm as norm
from benchmarks.micro import test_rope as rope
from benchmarks.micro import test_vision as vision
from fastvlm import ops

F32 = torch.float32


def agree(
    functions: dict[str, measure.Function],
    operands: measure.Operands,
    comparable: measure.Function = lambda result: result,
) -> None:
    answers = {
        name: function(*operands) if name == "fastvlm" else comparable(function(*operands))
        for name, function in functions.items()
    }
    assert len(answers) > 1
    measure.check_agreement(answers, F32)


def test_tiny_decoding_cases_agree_with_their_baselines() -> None:
    small = kinds.LinearCase("linear-tiny", 3, 17, 9, True)
    functions = {"torch": torch.nn.functional.linear, "fastvlm": ops.linear}
    agree(functions, linear.operands(small, F32, "cpu"))
    for gated in (False, True):
        tiny_mlp = kinds.MlpCase("mlp-tiny", 3, 17, 33, gated)
        agree(mlp.functions(tiny_mlp), mlp.operands(tiny_mlp, F32, "cpu"))
        step = dataclasses.replace(tiny_mlp, trains=True)
        # the result and a gradient for each operand
        operands = mlp.operands(step, F32, "cpu")
        agree(mlp.functions(step), operands)
        assert len(mlp.functions(step)["fastvlm"](*operands)) == len(operands)
    for softcap, heads in ((None, 4), (None, 2), (5.0, 2)):
        tiny = kinds.AttentionCase("attention-tiny", 2, 3, 7, 4, heads, 8, softcap)
        agree(attention.functions(tiny), attention.operands(tiny, F32, "cpu"))
    topk = kinds.TopkCase("loss-tiny", 3, 17, 40, 5.0, 4)
    agree(loss.topk_functions(topk), loss.head(topk, F32, "cpu"))


@pytest.mark.parametrize(("keys", "softcap"), [(9, None), (9, 5.0), (None, 5.0)])
def test_tiny_captions_agree_with_the_padded_baselines(
    keys: int | None, softcap: float | None
) -> None:
    tiny = kinds.CaptionsCase("attention-tiny", 2, (3, 1, 5, 2), keys, 4, 2, 8, softcap)
    operands = training.operands(tiny, F32, "cpu")
    agree(training.functions(tiny), operands, training.packed_results(tiny))


@pytest.mark.parametrize(("keys", "softcap"), [(9, None), (9, 5.0), (None, 5.0)])
def test_packed_baselines_of_a_gpu_agree_as_far_as_they_run_here(
    keys: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    tiny = kinds.CaptionsCase("attention-tiny", 2, (3, 1, 5, 2), keys, 4, 2, 8, softcap)
    sides = gpu_baselines.attention(keys is None, 8**-0.5, softcap)
    assert "flex" in sides
    (q, k, v, layout, _), _ = training.operands(tiny, F32, "cpu")
    op = ops.self_attention if keys is None else ops.cross_attention
    answers = {
        "fastvlm": op(q, k, v, layout, softcap=softcap),
        "flex": sides["flex"](q, k, v, layout),
    }
    measure.check_agreement(answers, F32)
    for library in ("flash-attn", "liger", "cut-cross-entropy"):
        gpu_baselines.cross_entropy(30.0, -100)
        assert library in sides or library in measure.MISSING, library


@pytest.mark.parametrize("trains", [False, True])
def test_tiny_norms_and_rope_agree_with_eager(trains: bool) -> None:
    for op in ("rms_norm", "residual_rms_norm", "residual_layer_norm"):
        tiny = kinds.NormCase("norm-tiny", 5, op, 16, trains)
        functions = norm.functions(tiny, compiled=False)
        operands = norm.operands(tiny, F32, "cpu")
        agree(functions, operands)
        # in training a gradient for every operand behind the results
        results = measure.as_tuple(functions["fastvlm"](*operands))
        gradients = len(operands) - 1 if trains else 0
        assert len(results) == gradients + (2 if op == "residual_rms_norm" else 1)
    turned = kinds.RopeCase("rope-tiny", 5, 4, 2, 8, trains)
    agree(rope.functions(turned, compiled=False), rope.operands(turned, F32, "cpu"))


def test_compiled_baseline_agrees() -> None:
    tiny = kinds.RopeCase("rope-tiny", 5, 4, 2, 8)
    functions = rope.functions(tiny)
    if "torch.compile" not in functions:
        pytest.skip(measure.MISSING["torch.compile"])
    agree(functions, rope.operands(tiny, F32, "cpu"))


@pytest.mark.parametrize("engine", engines.PACKAGES)
def test_engines_agree(engine: str) -> None:
    if not engines.available(engine):
        pytest.skip(measure.MISSING[engine])
    tiny = kinds.MlpCase("mlp-tiny", 3, 17, 33, True, engines=True)
    agree(mlp.functions(tiny, [engine]), mlp.operands(tiny, F32, "cpu"))


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MISSING", {})
    monkeypatch.setitem(engines.PACKAGES, "absent", ("no_such_package",))
    assert not engines.available("absent")
    assert "no_such_package" in measure.MISSING["absent"]


def test_tiny_loss_agrees_and_its_memory_is_measured() -> None:
    tiny = kinds.LossCase("loss-tiny", 64, 16, 50_000, 5.0, 25)
    agree(loss.loss_functions(tiny), loss.loss_operands(tiny, F32, "cpu"))
    # in a process of its own: in this one memory that was freed before would serve; eager holds the
    # logits at least once
    code = (
        "from benchmarks import memory; from benchmarks.kinds import LossCase; "
        f"print(memory.extra_memory({tiny!r}, 'eager'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=memory.ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 64 * 50_000 * 4 / memory.MIB


def test_tiny_vision_tower_agrees() -> None:
    from fastvlm.loading.random_florence2 import small

    pixels = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        agree(vision.towers(vision.model(small())), (pixels,))


@pytest.mark.parametrize(
    ("case", "padded"), zip(cases.VISION, (41_780_092_928, 379_775_877_120)), ids=("224", "768")
)
def test_vision_case_counts_as_pytorch_does(case: kinds.VisionCase, padded: int) -> None:
    """Of the patched tower, which computes no padding; its attention is what the counter knows."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        tower = vision.model().model.vision_tower
        pixels = torch.empty(1, 3, case.image_size, case.image_size)

    def count() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            grid = tower(pixels).last_hidden_state.shape[-2:]
        assert grid.numel() == case.rows
        return counter.get_total_flops()

    assert count() == padded
    fastvlm.patch(tower, only="attention")
    assert count() == case.flops
    assert sum(p.numel() for p in tower.parameters()) == case.parameters
