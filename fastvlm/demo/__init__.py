"""The demo: one photo captioned by Florence-2 through transformers and patched by fastvlm."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed arguments (`fastvlm.demo.arguments`); returns the exit code."""
    # imported here: the command line must print its help without importing torch
    from fastvlm.demo import show

    return show.run(args)
