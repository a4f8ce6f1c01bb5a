"""The demo: one photo captioned by Florence-2 through transformers and patched by fastvlm."""

from __future__ import annotations

import argparse

from fastvlm.demo.arguments import UsageError


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed arguments (`fastvlm.demo.arguments`); returns the exit code."""
    # imported here: the command line must print its help without importing torch
    try:
        from fastvlm.demo import show
    except ModuleNotFoundError as error:
        wanted = "what pip install 'fastvlm[demo]' brings"
        raise UsageError("the demo", wanted, f"no module {error.name}") from None

    return show.run(args)
