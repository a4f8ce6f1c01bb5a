"""Shows the arguments of a docstring, "name: what it is" with hanging lines, as a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(?P<names>\*{0,2}\w+(?: \[[^\]]*\])?(?:, \w+(?: \[[^\]]*\])?)*): ")


def listed(text: str) -> str:
    """A paragraph whose first line is an argument becomes a list of its arguments."""
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if not _ARGUMENT.match(lines[0]) or lines[0].startswith(("Source:", "Raises:", "Returns:")):
        return text
    return "\n".join(_ARGUMENT.sub(r"- **\g<names>**: ", line) for line in lines)


class Arguments(griffe.Extension):
    """For mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
