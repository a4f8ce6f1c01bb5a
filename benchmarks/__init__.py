"""Benchmarks of fastvlm against what a user would otherwise run: ``make bench``."""
