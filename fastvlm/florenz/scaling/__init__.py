"""The two scaling laws of arXiv 2503.09443, fitted to runs of one's own.

runs.py   what one run was and reached, a line of JSON each
flops.py  multiply-adds of a sample, counted on the unpatched model
laws.py   the fits, with confidence intervals and p-values
plots.py  the pictures
command.py  ``fastvlm florenz scaling``
"""

from fastvlm.florenz.scaling.flops import macs_per_sample
from fastvlm.florenz.scaling.laws import (
    Coefficient,
    Fit,
    fit_compute,
    fit_size_and_samples,
    pareto_frontier,
)
from fastvlm.florenz.scaling.runs import Run, read_runs

__all__ = [
    "Coefficient",
    "Fit",
    "Run",
    "fit_compute",
    "fit_size_and_samples",
    "macs_per_sample",
    "pareto_frontier",
    "read_runs",
]
