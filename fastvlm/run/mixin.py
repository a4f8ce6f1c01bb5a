"""What stands before another's class, and takes over its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class Mixin(nn.Module):
        """A class whose forward takes over from another's: it finds that one's attributes."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Mixin = nn.Module


def by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of which the first were given by place. TypeError as Python itself gives it."""
    if not args:
        return kwargs
    if len(args) > len(names):
        raise TypeError(f"takes {len(names) + 1} positional arguments; got {len(args) + 1}")
    given = dict(zip(names, args))
    for name in given:
        if name in kwargs:
            raise TypeError(f"got multiple values for argument {name!r}")
    return given | kwargs
