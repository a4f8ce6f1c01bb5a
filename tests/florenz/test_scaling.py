"""The laws find exponents that are known, on the paper's points too; compute is the paper's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm.__main__ import main
from fastvlm.florenz import FlorenzConfig
from fastvlm.florenz.scaling import (
    Run,
    fit_compute,
    fit_size_and_samples,
    macs_per_sample,
    pareto_frontier,
    read_runs,
)

# arXiv 2503.09443, sections 1, 3 and 4: parameters, trainable ones, forward GMAC of a sample
SIZES = {
    "0.4B": (428.8e6, 337.6e6, 62.0),
    "1.0B": (1039.7e6, 676.9e6, 170.5),
    "3.5B": (3485.0e6, 1097.6e6, 488.7),
    "11.2B": (11221.8e6, 2534.8e6, 1494.4),
}
SAMPLES = [1024 * steps for steps in (500, 2000, 5000, 10_000)]
# its second law, first version: log10 b0, exponents of parameters and of samples
PAPER = {"UC": (2.30, -0.16, -0.04), "ST": (3.03, -0.15, -0.19), "SC": (2.20, -0.13, -0.15)}
AT_MOST = {  # its values at 10.24M samples
    "UC": (4.35, 3.78, 3.11, 2.58),
    "ST": (2.53, 2.22, 1.85, 1.55),
    "SC": (1.06, 0.95, 0.81, 0.70),
}


def grid(loss: Callable[[float, float, int], dict[str, float]]) -> list[Run]:
    return [
        Run(size, int(p), int(trainable), s, macs * 1e9, loss(p, s, t), t)
        for size, (p, trainable, macs) in SIZES.items()
        for s in SAMPLES
        for t in (2, 6)
    ]


def second_law(p: float, s: float, t: int) -> dict[str, float]:
    return {g: 10**b0 * p**b1 * s**b2 for g, (b0, b1, b2) in PAPER.items()}


@pytest.mark.parametrize("group", PAPER)
def test_the_papers_second_law_is_found_again(group: str) -> None:
    fit = fit_size_and_samples(grid(second_law), group)
    assert [c.value for c in fit.coefficients] == pytest.approx(PAPER[group], abs=1e-9)
    assert fit.r_squared == pytest.approx(1)
    for (p, _, _), value in zip(SIZES.values(), AT_MOST[group]):
        # the paper's exponents have two places: what they leave open is a tenth
        assert fit.predict(P=p, S=10.24e6)[0] == pytest.approx(value, rel=0.1)


def test_languages_are_a_third_variable() -> None:
    def loss(p: float, s: float, t: int) -> dict[str, float]:
        return {"UC": 10**2.0 * p**-0.1 * s**-0.05 * t**-0.4}

    fit = fit_size_and_samples(grid(loss), "UC", languages=True)
    assert [c.value for c in fit.coefficients] == pytest.approx([2.0, -0.1, -0.05, -0.4])
    assert fit.law == "b0 P^b1 S^b2 T^b3"
    assert fit.predict(P=1e9, S=1e6, T=4)[0] == pytest.approx(loss(1e9, 1e6, 4)["UC"])


def test_compute_is_fitted_on_the_frontier_alone() -> None:
    runs = [
        Run("a", 10**6, 5 * 10**5, 10**k, 1e9, {"SC": 30.0 * (1.5 * 10**k) ** -0.15})
        for k in range(3, 8)
    ]
    beaten = [replace(run, losses={"SC": run.losses["SC"] * 1.3}) for run in runs]
    assert pareto_frontier([*beaten, *runs], "SC") == runs
    fit = fit_compute([*beaten, *runs], "SC")
    assert fit.exponent("C^a1") == pytest.approx(-0.15)
    assert 10 ** fit.exponent("log10 a0") == pytest.approx(30)
    assert fit.points == 5


def test_intervals_hold_what_they_promise() -> None:
    """Of 200 fits to noisy losses, about 95 in 100 intervals hold the true exponent."""
    chance, held = random.Random(0), 0
    clean = grid(second_law)
    for _ in range(200):
        noisy = [
            replace(run, losses={"ST": run.losses["ST"] * 10 ** chance.gauss(0, 0.02)})
            for run in clean
        ]
        fit = fit_size_and_samples(noisy, "ST")
        _, b1, _ = fit.coefficients
        held += b1.low <= PAPER["ST"][1] <= b1.high
        assert b1.p < 1e-6
        value, low, high = fit.predict(P=1e9, S=1e6)
        assert low < value < high
    assert 180 <= held <= 199


def test_compute_counts_training() -> None:
    run = Run("a", 100, 50, 1000, 2e9, {"SC": 1.0})
    assert run.gmacs == pytest.approx(1000 * 2 * 1.5)


@pytest.mark.parametrize("size", SIZES)
def test_multiply_adds_are_the_papers(size: str) -> None:
    """To the four digits that are told."""
    counted = macs_per_sample(FlorenzConfig.of_size(size)) / 1e9
    assert counted == pytest.approx(SIZES[size][2], rel=1e-3)


GOOD = Run("a", 100, 50, 1000, 2e9, {"SC": 1.0})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: replace(GOOD, samples=0), "samples must be a number above 0; got 0"),
        (lambda: replace(GOOD, losses={}), "losses must be given"),
        (lambda: replace(GOOD, losses={"SC": float("nan")}), "the loss of SC must be a number"),
        (lambda: replace(GOOD, languages=-1), "languages must be"),
        (lambda: fit_compute([GOOD], "SC"), "runs must be 3 or more .* got '1 of them'"),
        (lambda: fit_compute([GOOD], "XX"), r"group must be of \['SC'\]; got 'XX'"),
        (lambda: fit_size_and_samples([GOOD] * 9, "SC"), "different in P .* got '100 in all'"),
        (lambda: fit_size_and_samples(grid(second_law), "SC", confidence=1), "confidence must be"),
        (lambda: fit_size_and_samples([GOOD], "SC", languages=True), "told by every run"),
        (lambda: macs_per_sample(None, image_size=0), "image_size must be a whole number"),
        (
            lambda: fit_size_and_samples(
                [replace(GOOD, parameters=100 * k, samples=7 * k) for k in range(1, 9)], "SC"
            ),
            "a grid in P",
        ),
    ],
)
def test_runs_that_no_law_can_be_fitted_to(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.slow
def test_the_command_fits_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.jsonl"
    lines = [json.dumps(vars(run)) for run in grid(second_law)]
    file.write_text("\n".join(lines) + "\n")
    assert read_runs(file) == grid(second_law)
    assert main(["florenz", "scaling", str(file), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "-0.160" in printed
    assert "T^b3" in printed
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"compute-UC.svg", "compute-UC.png", "size-SC.svg", "fits.json"} <= made
    fits = json.loads((tmp_path / "out" / "fits.json").read_text())
    assert {fit["group"] for fit in fits} == {"UC", "ST", "SC"}


@pytest.mark.parametrize("content", ["", "{", '{"size": "a"}', json.dumps(vars(GOOD))])
def test_the_command_refuses(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.jsonl").write_text(content)
    assert main(["florenz", "scaling", str(tmp_path / "runs.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("fastvlm florenz: RUNS wants a file of runs")


def test_the_kept_runs_give_the_kept_laws() -> None:
    """benchmarks/results/florenz-*: what docs/florenz.md says of them was fitted to them."""
    results = Path(__file__).parents[2] / "benchmarks/results"
    runs = read_runs(results / "florenz-runs.jsonl")
    whole = json.loads((results / "florenz-grid.json").read_text())["runs"]
    assert [run.losses for run in runs] == [run["losses"] for run in whole]
    fits = {
        (fit.law, fit.group): fit
        for group in ("SC", "ST", "UC")
        for fit in (
            fit_compute(runs, group),
            fit_size_and_samples(runs, group, languages=True),
        )
    }
    kept = json.loads((results / "florenz-laws.json").read_text())
    assert {(fit["law"], fit["group"]) for fit in kept} == set(fits)
    for fit in kept:
        found = fits[fit["law"], fit["group"]]
        for coefficient, ours in zip(fit["coefficients"], found.coefficients, strict=True):
            assert (coefficient["value"], coefficient["low"], coefficient["high"]) == pytest.approx(
                (ours.value, ours.low, ours.high), rel=1e-6
            )
