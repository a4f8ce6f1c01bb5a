"""The demo: one photo captioned with and without fastvlm."""

from __future__ import annotations

import argparse
from importlib import import_module

from fastvlm.demo.arguments import UsageError


def run(args: argparse.Namespace) -> int:
    """Run a command, demo or caption, with its parsed arguments; returns the exit code."""
    # imported here: the command line must print its help without importing torch
    name = "captioning.command" if args.command == "caption" else "demo.show"
    try:
        command = import_module(f"fastvlm.{name}")
    except ModuleNotFoundError as error:
        wanted = "what pip install 'fastvlm[demo]' brings"
        raise UsageError("this command", wanted, f"no module {error.name}") from None

    return int(command.run(args))
