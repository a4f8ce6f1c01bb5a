"""One layer by its spec, whatever runs it: modules on rows, or the writer of a step's program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from fastvlm.models.spec import Residual
from fastvlm.models.structure import part_of

Rows = TypeVar("Rows")


class Runner(Protocol[Rows]):
    """What computes with rows of one layer: tensors, or the numbers of registers."""

    def norm(self, x: Rows, norm: Any) -> Rows:
        """norm(x)."""

    def branch(self, x: Rows, residual: Residual) -> Rows:
        """What the branch gives of rows that are normalized as it wants them."""

    def join(
        self, x: Rows, h: Rows, residual: Residual, following: Any
    ) -> tuple[Rows, Rows | None]:
        """What a branch gives, and the stream -> the stream, and with following its norm."""


def run_layer(
    runner: Runner[Rows],
    layer: Any,
    residuals: Sequence[Residual],
    h: Rows,
    normed: Rows | None = None,
    following: Any = None,
) -> tuple[Rows, Rows | None]:
    """The stream h behind the layer, and following(h) where a norm of what comes next is given.

    normed: what the first branch reads, where that is known. A norm behind a branch and the one
    before the next are one op where both are fused: so the latter belongs to the sum.
    """
    for residual, then in zip(residuals, (*residuals[1:], None)):
        if normed is None:
            before = residual.before
            normed = h if before is None else runner.norm(h, part_of(layer, before))
        x = runner.branch(normed, residual)
        behind = following
        if then is not None:
            behind = None if then.before is None else part_of(layer, then.before)
        h, normed = runner.join(x, h, residual, behind)
    return h, normed
