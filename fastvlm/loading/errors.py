"""The one error of `fastvlm.load`: what was wanted, what was found, where."""

from __future__ import annotations

from collections.abc import Sequence

MOST_NAMED = 5


class LoadError(ValueError):
    """A checkpoint that cannot be loaded as it is. Nothing is half loaded."""

    def __init__(self, where: object, problem: str) -> None:
        super().__init__(f"fastvlm.load: {where}: {problem}")
        self.problem = problem


def named(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
