"""A planned step as one call on the CPU: the bits of the ops one by one, and nothing unsafe."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from bert_models import BERTS
from gemma3_models import GEMMA3
from llama_models import LLAMAS
from models import FAMILIES, RELATIVES
from pix2struct_models import PIX2STRUCT
from test_families import generate
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastvlm
from fastvlm import extension
from fastvlm.cpu import step as cpu_step
from fastvlm.cpu.step import CpuStep, timed
from fastvlm.run.program import Program

PLANNED = [
    *("bart", "florence2", "gemma2", "florenz", "t5gemma", "mbart", "whisper"),
    *("m2m_100", "marian", "t5", "flan_t5", "umt5", "roberta", "blip", "vit_gpt2", "gpt2"),
    *("t5gemma2", "gemma3", "pix2struct"),
]
MODELS = {**FAMILIES, **RELATIVES, **BERTS, **GEMMA3, **LLAMAS, **PIX2STRUCT}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not extension.available():
        pytest.skip(f"no CPU extension: {extension.reason()}")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[CpuStep]:
    """The steps that ran in one call."""
    found: list[CpuStep] = []
    run = CpuStep.__call__

    def noted(self: CpuStep, *args: Any) -> Tensor:
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(CpuStep, "__call__", noted)
    return found


def patched(
    name: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Module, dict[str, Any]]:
    model = MODELS[name].build()
    inputs = MODELS[name].inputs(model)
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    fastvlm.patch(model, **settings)
    return model, inputs


SCORED = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_the_ops(
    name: str, dtype: torch.dtype, served: list[CpuStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = patched(name, dtype)
    ours = generate(model, inputs, **SCORED)
    # of twelve new tokens the prefill gives the first; in float16 modules look for the infinite
    clamps = "t5" in name[-5:] or name == "pix2struct"
    assert len(served) == (0 if clamps and dtype == torch.float16 else 11)
    count = len(served)
    monkeypatch.setattr(CpuStep, "serves", lambda self, x: False)
    theirs = generate(model, inputs, **SCORED)
    assert len(served) == count
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores):
        if name == "t5gemma2":  # PyTorch's logarithm joins two attentions there
            assert torch.allclose(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weights_in_fewer_bits(
    name: str, weights: str, served: list[CpuStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between products the activation is PyTorch's there and ours here."""
    model, inputs = patched(name, weights=weights)
    ours = generate(model, inputs, **SCORED)
    assert len(served) == 11
    monkeypatch.setattr(CpuStep, "serves", lambda self, x: False)
    theirs = generate(model, inputs, **SCORED)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores):
        assert torch.allclose(a, b, atol=1e-4)


def test_who_wants_the_ops_gets_them(served: list[CpuStep]) -> None:
    model, inputs = patched("bart")
    expected = generate(model, inputs, num_beams=2)
    assert served
    served.clear()
    with fastvlm.use("reference"):
        generate(model, inputs, num_beams=2)
    assert not served
    with fastvlm.use("cpu"):
        assert torch.equal(generate(model, inputs, num_beams=2), expected)
    assert served


def test_many_rows_are_a_library_s(served: list[CpuStep]) -> None:
    model, inputs = patched("bart")
    many = {name: value[:1].repeat(70, 1) for name, value in inputs.items()}
    few = {name: value[:1] for name, value in inputs.items()}
    out = generate(model, many, max_new_tokens=4, min_new_tokens=4)
    assert not served
    assert torch.equal(out[:1], generate(model, few, max_new_tokens=4, min_new_tokens=4))
    assert served


def test_nothing_is_allocated_between_the_instructions(served: list[CpuStep]) -> None:
    model, inputs = patched("florenz")
    places = []
    run = CpuStep.__call__

    def noted(self: CpuStep, *args: Any) -> Tensor:
        out = run(self, *args)
        arena = self._arena
        assert arena is not None
        places.append(arena.data_ptr())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuStep, "__call__", noted)
        generate(model, inputs, num_beams=3)
    assert len(places) == 11
    assert len(set(places)) == 1


def test_the_result_is_the_caller_s(served: list[CpuStep]) -> None:
    """What a step gave is not written over by the next."""
    model, inputs = patched("bart")
    states: list[tuple[Tensor, Tensor]] = []
    decoder = model.model.decoder
    forward = type(decoder).forward

    def kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        states.append((out.last_hidden_state, out.last_hidden_state.clone()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(decoder), "forward", kept)
        generate(model, inputs)
    assert len(served) == 11
    assert all(torch.equal(given, copy) for given, copy in states)


def test_seconds_by_op(served: list[CpuStep]) -> None:
    model, inputs = patched("bart")
    with timed() as seconds:
        generate(model, inputs)
        assert seconds == {}
    assert seconds["linear"] > 0
    assert seconds["cross_attention"] > 0
    assert seconds["rope"] == 0
    count = len(served)
    generate(model, inputs)
    assert len(served) == 2 * count
    assert cpu_step._seconds is None


class TestRegisters:
    def test_an_instruction_never_writes_what_it_reads(self) -> None:
        for name in PLANNED:
            model, inputs = patched(name)
            steps: list[Any] = []
            made = CpuStep.__init__

            def noted(
                self: CpuStep, instructions: Any, widths: Any, steps: Any = steps, made: Any = made
            ) -> None:
                steps.append((instructions, widths))
                made(self, instructions, widths)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CpuStep, "__init__", noted)
                generate(model, inputs)
            instructions, widths = steps[0]
            numbers, arena = cpu_step._registers(instructions, widths)
            assert len(arena) < len(widths) / 2
            holds = {0: 0}
            for each in instructions:
                for register in each.rows:  # what it reads is still there
                    assert holds[numbers[register]] == register
                assert not {numbers[r] for r in each.rows} & {numbers[r] for r in each.results}
                assert len({numbers[r] for r in each.results}) == len(each.results)
                holds |= {numbers[r]: r for r in each.results}
            assert numbers[-1] == len(arena) + 1


def call(
    change: Callable[[dict[str, Any]], None] = lambda given: None, rows: int = 3
) -> dict[str, Any]:
    """The arguments of a step of one self-attention of 2 heads of 8 between two products."""
    program = Program(16)
    linear = [nn.Linear(16, 16) for _ in range(4)]

    class Attention:
        head_dim, scaling = 8, 0.3

    q, k, v = program.linear(0, *linear[:3])
    y = program.self_attention(q, k, v, Attention(), None, Attention.scaling)
    program.linear(y, linear[3])
    made = CpuStep(program.instructions, program.widths)
    code, widths, numbers = made._fixed
    given = {
        "x": torch.randn(rows, 16),
        "code": code,
        "widths": widths,
        "numbers": numbers,
        "tensors": [t.detach() for t in made._tensors],
        "caches": [torch.randn(rows, 5, 2, 8) for _ in range(2)],
        "start": 3,
        "lengths": torch.full((rows,), 4, dtype=torch.int32),
        "ancestry": None,
        "where": [],
        "rotation": [],
        "arena": torch.empty(rows * int(widths.sum())),
        "out": torch.empty(rows, 16),
        "seconds": None,
    }
    change(given)
    return given


PROGRAM = ("code", "widths", "numbers", "tensors")


def run(given: dict[str, Any]) -> Tensor:
    library = torch.ops.fastvlm_cpu
    program = [given[name] for name in PROGRAM]
    number = library.step_program(*program)
    rest = {name: value for name, value in given.items() if name not in PROGRAM}
    try:
        library.step(rest.pop("x"), number, *rest.values())
    finally:
        library.forget_program(program[0], number)
    out: Tensor = given["out"]
    return out


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.__setitem__(name, value(given[name]))


BAD = {
    "arena": put("arena", lambda t: t[:-1]),
    "arena-dtype": put("arena", lambda t: t.double()),
    "out-dtype": put("out", lambda t: t.half()),
    "out-rows": put("out", lambda t: t[:-1]),
    "out-narrow": put("out", lambda t: t[:, :8].contiguous()),
    "out-wide": put("out", lambda t: torch.empty(3, 32)),
    "code-ends": put("code", lambda t: t[:-1]),
    "code-missing": put("code", lambda t: t[:-9]),
    "code-type": put("code", lambda t: t.int()),
    "no-op": put("code", lambda t: torch.cat([torch.tensor([99]), t[1:]])),
    "no-register": put("code", lambda t: torch.where(t == 3, 77, t)),
    "written-x": put("code", lambda t: torch.cat([t[:2], torch.tensor([0]), t[3:]])),
    "numbers": put("numbers", lambda t: t[:1]),
    "tensors": put("tensors", lambda t: t[:-1]),
    "weight": put("tensors", lambda t: [t[0][:, :8].contiguous(), *t[1:]]),
    "weight-rows": put("tensors", lambda t: [torch.randn(32, 16), *t[1:]]),
    "bias": put("tensors", lambda t: [t[0], t[1][:8], *t[2:]]),
    "caches": put("caches", lambda t: t[:1]),
    "cache-full": put("start", lambda n: 5),
    "cache-before": put("start", lambda n: -1),
    "cache-rows": put("caches", lambda t: [c[:2] for c in t]),
    "cache-heads": put("caches", lambda t: [torch.randn(3, 5, 1, 8) for _ in t]),
    "cache-strides": put("caches", lambda t: [torch.randn(3, 2, 5, 8).transpose(1, 2) for _ in t]),
    "lengths": put("lengths", lambda t: t + 9),
    "lengths-count": put("lengths", lambda t: t[:2]),
    "ancestry": put("ancestry", lambda t: torch.zeros(3, 3, dtype=torch.int32)),
    "ancestry-beyond": put("ancestry", lambda t: torch.full((3, 5), 3, dtype=torch.int32)),
    "seconds": put("seconds", lambda t: torch.zeros(2, dtype=torch.float64)),
}


class TestBadPrograms:
    """Nothing outside of what was given is touched, whatever the integers say."""

    def test_a_good_one(self) -> None:
        given = call()
        before = [cache.clone() for cache in given["caches"]]
        x, weights, biases = given["x"], given["tensors"][::2], given["tensors"][1::2]
        q, k, v = (x @ w.t() + b for w, b in zip(weights[:3], biases[:3]))
        out = run(given)
        for cache, old, new in zip(given["caches"], before, (k, v)):
            old[:, 3] = new.view(3, 2, 8)
            assert torch.allclose(cache, old, atol=1e-6)
        keys, values = (cache[:, :4].transpose(1, 2) for cache in given["caches"])
        scores = (q.view(3, 2, 1, 8) @ keys.transpose(2, 3) * 0.3).softmax(-1)
        expected = (scores @ values).reshape(3, 16) @ weights[3].t() + biases[3]
        assert torch.allclose(out, expected, atol=1e-5)

    @pytest.mark.parametrize("name", BAD)
    def test_a_bad_one_is_refused(self, name: str) -> None:
        with pytest.raises(RuntimeError, match=r"expected|code:|arena|does not fit|cache"):
            run(call(BAD[name]))

    def test_no_rows(self) -> None:
        assert run(call(rows=0)).shape == (0, 16)

    @pytest.mark.parametrize("number", [0, -1, 2**40])
    def test_a_program_that_is_not_there(self, number: int) -> None:
        rest = {name: value for name, value in call().items() if name not in PROGRAM}
        torch.ops.fastvlm_cpu.forget_program(torch.zeros(0, dtype=torch.int64), number)
        with pytest.raises(RuntimeError, match=f"program: there is no {number}"):
            torch.ops.fastvlm_cpu.step(rest.pop("x"), number, *rest.values())


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode, FlopCounterMode])
def test_a_program_goes_with_its_step(served: list[CpuStep], mode: Any) -> None:
    """And with it the tensors that it holds."""
    model, inputs = patched("bart")
    generate(model, inputs)
    number = served[-1]._program
    weight = weakref.ref(served[-1]._tensors[0])
    rest = {name: value for name, value in call().items() if name not in PROGRAM}
    fastvlm.unpatch(model)
    del model
    with mode():  # whatever happens to be going on
        served.clear()
        gc.collect()
    assert weight() is None
    with pytest.raises(RuntimeError, match=f"program: there is no {number}"):
        torch.ops.fastvlm_cpu.step(rest.pop("x"), number, *rest.values())


def test_a_default_device_is_nobody_s_business(served: list[CpuStep]) -> None:
    model, inputs = patched("bart")
    expected = generate(model, inputs)
    run = CpuStep.__init__

    def elsewhere(self: CpuStep, *args: Any) -> None:
        with torch.device("meta"):
            run(self, *args)

    served.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuStep, "__init__", elsewhere)
        assert torch.equal(generate(model, inputs), expected)
    assert len(served) == 11
