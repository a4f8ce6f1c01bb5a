"""Runs a case through pytest-benchmark, interleaved with its baselines, and writes the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import Case
from fastvlm import env

Build = Callable[[], measure.Operands]
RESULTS = Path(__file__).resolve().parent.parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvlm benchmarks")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-threads", type=int, default=None)
    group.addoption("--bench-rounds", type=int, default=measure.ROUNDS)
    group.addoption("--bench-out", type=Path, default=RESULTS, help="folder of the results file")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--bench-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--bench-device cuda: PyTorch sees no GPU")
    threads = request.config.getoption("--bench-threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return name


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = getattr(torch, request.param)
    return value


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest, device: str) -> Iterator[list[dict[str, Any]]]:
    """Filled by the cases and written when the session ends. A run of some cases (-k) has a file
    of its own, so that it does not take the place of a full one."""
    found: list[dict[str, Any]] = []
    load = env.load_average()
    yield found
    if not found:
        return
    folder: Path = request.config.getoption("--bench-out")
    folder.mkdir(parents=True, exist_ok=True)
    part = "-part" if request.config.getoption("keyword") else ""
    path = folder / f"micro-{device}{part}.json"
    head = {
        **env.stamp(),
        "device": device,
        "threads": torch.get_num_threads(),
        "stream_gb_per_s": round(measure.stream_bandwidth(device) / 1e9, 2),
        "rounds": request.config.getoption("--bench-rounds"),
        "load_average_before": load,
    }
    path.write_text(json.dumps({**head, "cases": found}, indent=1) + "\n")
    print(f"\nwritten: {path}")


@pytest.fixture
def run_case(
    benchmark: Any,
    request: pytest.FixtureRequest,
    records: list[dict[str, Any]],
    device: str,
    dtype: torch.dtype,
) -> Callable[[Case, Build, dict[str, Callable[..., Any]]], None]:
    """run(case, build, functions): functions holds "fastvlm" and its baselines.

    pytest-benchmark times ours; before each of its rounds every baseline has its own, timed here,
    so that they alternate. All are first checked to agree.
    """

    def run(case: Case, build: Build, functions: dict[str, Callable[..., Any]]) -> None:
        rounds = request.config.getoption("--bench-rounds") if benchmark.enabled else 1
        wanted = measure.copies_for(case, dtype.itemsize, device) if benchmark.enabled else 1
        copies = [build() for _ in range(wanted)]
        _check_agreement(functions, copies[0], dtype)
        apart = len(copies) // len(functions)
        turns = {
            name: measure.Rotation(function, copies, start=number * apart)
            for number, (name, function) in enumerate(functions.items())
        }
        ours = turns.pop("fastvlm")
        seconds: dict[str, list[float]] = {name: [] for name in ("fastvlm", *turns)}

        def baselines() -> None:
            for name, turn in turns.items():
                seconds[name].append(measure.timed(turn, device))
            measure.synchronize(device)

        def one_round() -> None:
            start = time.perf_counter()
            ours()
            measure.synchronize(device)
            seconds["fastvlm"].append(time.perf_counter() - start)

        benchmark.group = case.name
        with torch.inference_mode():
            benchmark.pedantic(one_round, setup=baselines, rounds=rounds, warmup_rounds=2)
        if not benchmark.enabled:
            return
        timed_only = {name: values[-rounds:] for name, values in seconds.items()}
        entry = measure.record(case, dtype, device, timed_only)
        benchmark.extra_info.update(entry)
        records.append(entry)

    return run


def _check_agreement(
    functions: dict[str, Callable[..., Any]], operands: measure.Operands, dtype: torch.dtype
) -> None:
    """A fast wrong answer is not a result. The tests check precisely; this catches a mix-up."""
    with torch.inference_mode():
        answers = {name: function(*operands) for name, function in functions.items()}
    ours = answers.pop("fastvlm").float()
    loose = 1e-4 if dtype == torch.float32 else 3e-2
    for name, answer in answers.items():
        error = (ours - answer.float()).abs().max() / answer.float().abs().max()
        assert error < loose, f"fastvlm and {name} differ by {error:.1e} of the largest value"
