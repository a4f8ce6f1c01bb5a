"""One file per op, the same names as in fastvlm/ops; cases from benchmarks/cases.py."""
