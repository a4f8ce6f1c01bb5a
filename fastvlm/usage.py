"""Errors of the command line: one line each, the argument, what it wants, what was given."""

from __future__ import annotations

from collections.abc import Callable

# Florence-2 knows 1024 positions; one is the start token
MOST_TOKENS = 1023


class UsageError(Exception):
    """An argument that cannot be used."""

    def __init__(self, argument: str, wanted: str, given: object) -> None:
        super().__init__(f"{argument} wants {wanted}; got {given}")


def whole_number(argument: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of argparse's arguments: whole numbers in a range, or UsageError."""
    wanted = f"a whole number of at least {least}" + (f" and at most {most}" if most else "")

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise UsageError(argument, wanted, repr(text)) from None
        if number < least or (most is not None and number > most):
            raise UsageError(argument, wanted, number)
        return number

    return parse
