"""Power laws in log space by ordinary least squares (arXiv 2503.09443, equations 1 and 3).

y = a0 C^a1 over compute, on the runs that no other beats with less; y = b0 P^b1 S^b2 over
parameters and samples, in the second version of the paper with T^b3 for the languages that the
decoder knew at first. Logarithms are to the base 10, intercepts are log10 a0 and log10 b0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm.checks import fail
from fastvlm.florenz.scaling.runs import Run

_OP = "florenz.scaling"


@dataclass(frozen=True)
class Coefficient:
    """One number of a law: its estimate, its confidence interval, and the p-value of it being 0."""

    name: str
    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.3f} [{self.low:.3f}, {self.high:.3f}], p = {self.p:.2g}"


@dataclass(frozen=True)
class Fit:
    """A law fitted to a group's losses. covariance: of the coefficients, in their order."""

    law: str
    group: str
    coefficients: tuple[Coefficient, ...]
    r_squared: float
    points: int
    covariance: tuple[tuple[float, ...], ...]
    quantile: float

    def exponent(self, name: str) -> float:
        """The estimate of that name. ValueError: the law has none."""
        for coefficient in self.coefficients:
            if coefficient.name == name:
                return coefficient.value
        raise fail(_OP, "name", f"of {[c.name for c in self.coefficients]}", name)

    def predict(self, **variables: float) -> tuple[float, float, float]:
        """The loss at these values, and the confidence interval of its mean.

        variables: C in 10^9 multiply-adds; or P, S and, where the law has it, T.
        ValueError: other variables than the law's.
        """
        wanted = [c.name.partition("^")[0] for c in self.coefficients[1:]]
        if sorted(wanted) != sorted(variables):
            raise fail(_OP, "variables", f"given as {', '.join(wanted)}", sorted(variables))
        row = [1.0, *(math.log10(variables[name]) for name in wanted)]
        mean = sum(x * c.value for x, c in zip(row, self.coefficients))
        variance = sum(
            a * b * self.covariance[i][j] for i, a in enumerate(row) for j, b in enumerate(row)
        )
        reach = self.quantile * math.sqrt(max(variance, 0.0))
        return 10**mean, 10 ** (mean - reach), 10 ** (mean + reach)


def pareto_frontier(runs: Sequence[Run], group: str) -> list[Run]:
    """The runs that no other reaches or beats in a group's loss with as much compute or less."""
    best, frontier = math.inf, []
    for run in sorted(runs, key=lambda run: (run.gmacs, _loss(run, group))):
        if _loss(run, group) < best:
            best = _loss(run, group)
            frontier.append(run)
    return frontier


def fit_compute(runs: Sequence[Run], group: str, *, confidence: float = 0.95) -> Fit:
    """The first law, on the Pareto frontier: loss = a0 C^a1, C in 10^9 multiply-adds.

    ValueError: a group that a run has no loss of; fewer than three runs on the frontier.
    """
    frontier = pareto_frontier(runs, group)
    columns = {"C^a1": [run.gmacs for run in frontier]}
    return _fit("a0 C^a1", "log10 a0", columns, frontier, group, confidence)


def fit_size_and_samples(
    runs: Sequence[Run], group: str, *, languages: bool = False, confidence: float = 0.95
) -> Fit:
    """The second law, on all runs: loss = b0 P^b1 S^b2, with languages also T^b3.

    ValueError: a group that a run has no loss of; runs that do not differ in one of the variables,
    or too few of them; languages without a number of them in each run.
    """
    columns = {
        "P^b1": [float(run.parameters) for run in runs],
        "S^b2": [float(run.samples) for run in runs],
    }
    law = "b0 P^b1 S^b2"
    if languages:
        if any(run.languages is None for run in runs):
            raise fail(_OP, "languages", "told by every run", "a run with None")
        columns["T^b3"] = [float(run.languages or 0) for run in runs]
        law += " T^b3"
    return _fit(law, "log10 b0", columns, runs, group, confidence)


def _loss(run: Run, group: str) -> float:
    if group not in run.losses:
        raise fail(_OP, "group", f"of {sorted(run.losses)}", group)
    return run.losses[group]


def _fit(
    law: str,
    intercept: str,
    columns: Mapping[str, list[float]],
    runs: Sequence[Run],
    group: str,
    confidence: float,
) -> Fit:
    import numpy as np
    import statsmodels.api as statistics
    from scipy.stats import t as student

    if not 0 < confidence < 1:
        raise fail(_OP, "confidence", "between 0 and 1", confidence)
    least = len(columns) + 2  # one more than coefficients, or there is no interval
    if len(runs) < least:
        raise fail(_OP, "runs", f"{least} or more for {law} ({group})", f"{len(runs)} of them")
    for name, values in columns.items():
        if len(set(values)) < 2:
            variable = name.partition("^")[0]
            raise fail(_OP, "runs", f"different in {variable} for {law}", f"{values[0]:g} in all")
    design: Any = np.log10(np.column_stack([list(values) for values in columns.values()]))
    if np.linalg.matrix_rank(design - design.mean(0)) < len(columns):
        raise fail(_OP, "runs", f"a grid in {', '.join(columns)}", "variables that go together")
    losses = np.log10([_loss(run, group) for run in runs])
    found = statistics.OLS(losses, statistics.add_constant(design)).fit()
    intervals = found.conf_int(alpha=1 - confidence)
    coefficients = tuple(
        Coefficient(name, float(value), float(low), float(high), float(p))
        for name, value, (low, high), p in zip(
            (intercept, *columns), found.params, intervals, found.pvalues
        )
    )
    covariance = tuple(tuple(float(x) for x in row) for row in found.cov_params())
    quantile = float(student.ppf((1 + confidence) / 2, found.df_resid))
    return Fit(law, group, coefficients, float(found.rsquared), len(runs), covariance, quantile)
