"""Runs a case through pytest-benchmark, interleaved with its baselines, and writes the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engines, measure
from benchmarks.kinds import Case
from fastvlm import env

Build = Callable[[], measure.Operands]
RESULTS = Path(__file__).resolve().parent.parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvlm benchmarks")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-threads", type=int, default=None)
    group.addoption("--bench-rounds", type=int, default=measure.ROUNDS)
    group.addoption("--bench-out", type=Path, default=RESULTS, help="folder of the results file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """16 bits in training are a GPU's work, float32 there nobody's."""
    on_gpu = config.getoption("--bench-device") == "cuda"

    def runs(item: Any) -> bool:
        case, dtype = (item.callspec.params[name] for name in ("case", "dtype"))
        name = str(dtype).removeprefix("torch.")
        return name == "bfloat16" if on_gpu and case.trains else name in case.dtypes or on_gpu

    parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        parameters = getattr(item, "callspec", None)
        measured = parameters is not None and {"case", "dtype"} <= parameters.params.keys()
        parts[not measured or runs(item)].append(item)
    if parts[False]:
        config.hook.pytest_deselected(items=parts[False])
        items[:] = parts[True]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--bench-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--bench-device cuda: PyTorch sees no GPU")
    threads = request.config.getoption("--bench-threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return name


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
    stamp = env.stamp()
    stamp["versions"] |= engines.versions()
    head = {
        **stamp,
        "device": device,
        "threads": torch.get_num_threads(),
        "stream_gb_per_s": max(entry["stream_gb_per_s"] for entry in found),
        "rounds": request.config.getoption("--bench-rounds"),
        "load_average_before": load,
        "missing_baselines": measure.MISSING,
    }
    path.write_text(json.dumps({**head, "cases": found}, indent=1) + "\n")
    print(f"\nwritten: {path}")


@pytest.fixture
def run_case(
    benchmark: Any,
    request: pytest.FixtureRequest,
    records: list[dict[str, Any]],
    device: str,
) -> Callable[..., None]:
    """run(case, dtype, build, functions): functions holds "fastvlm" and its baselines.

    pytest-benchmark times ours; before each of its rounds every baseline has its own, timed here,
    so that they alternate. All are first checked to agree: comparable maps a side's results, where
    they are arranged in another way, to what ours gives. extra: more for the results file.
    settle: each side is called once, untimed, before its timed call. Sides with threads of their
    own need it, or one's, still waiting busily for more work, would keep the next one's from a
    core.
    """

    def run(
        case: Case,
        dtype: torch.dtype,
        build: Build,
        functions: dict[str, measure.Function],
        comparable: dict[str, measure.Function] | None = None,
        extra: Callable[[], dict[str, Any]] | None = None,
        settle: bool = False,
    ) -> None:
        wanted = measure.copies_for(case, dtype.itemsize, device) if benchmark.enabled else 1
        copies = [build() for _ in range(wanted)]
        with torch.no_grad() if case.trains else torch.inference_mode():
            measure.check_agreement(_answers(functions, copies[0], comparable or {}), dtype)
            before = measure.stream_bandwidth(device) if benchmark.enabled else 0.0
            seconds = _interleaved(functions, copies, settle)
            if not benchmark.enabled:
                return
            bandwidth = max(before, measure.stream_bandwidth(device))
        entry = measure.record(case, dtype, device, seconds, bandwidth)
        if extra is not None:
            del copies
            entry |= extra()
        benchmark.extra_info.update(entry)
        records.append(entry)

    def _interleaved(
        functions: dict[str, measure.Function], copies: list[measure.Operands], settle: bool
    ) -> dict[str, list[float]]:
        apart = len(copies) // len(functions)
        turns = {
            name: measure.Rotation(function, copies, start=number * apart)
            for number, (name, function) in enumerate(functions.items())
        }
        ours = turns.pop("fastvlm")
        seconds: dict[str, list[float]] = {name: [] for name in ("fastvlm", *turns)}

        def baselines() -> None:
            for name, turn in turns.items():
                if settle:
                    turn()
                seconds[name].append(measure.timed(turn, device))
            if settle:
                ours()
            measure.synchronize(device)

        def one_round() -> None:
            seconds["fastvlm"].append(measure.timed(ours, device))

        def warm_up() -> float:
            baselines()
            one_round()
            return sum(values[-1] for values in seconds.values())

        rounds = 1
        if benchmark.enabled:
            # a first round still allocates and tunes; where it takes seconds, that is nothing
            one = warm_up()
            if one < measure.SLOW:
                one = warm_up()
            rounds = measure.rounds_for(request.config.getoption("--bench-rounds"), one)
        benchmark.pedantic(one_round, setup=baselines, rounds=rounds)
        return {name: values[-rounds:] for name, values in seconds.items()}

    benchmark.group = request.node.callspec.id
    return run


def _answers(
    functions: dict[str, measure.Function],
    operands: measure.Operands,
    comparable: dict[str, measure.Function],
) -> dict[str, Any]:
    return {
        name: comparable.get(name, lambda result: result)(function(*operands))
        for name, function in functions.items()
    }
