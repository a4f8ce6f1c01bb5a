"""Calls of each op as the models make them, for tools that need every kernel compiled.

The shapes are those of the decoders of Florence-2-base and -large and of Gemma-2-2b and -9b, in
training (rows of a packed batch) and in decoding (one to 64 rows). What counts is which
specializations they lead to: dtypes, sizes that are multiples of 16, options, blocks. So one call
stands for all that differ only in how much they do, and the tensors are left as they are
allocated: nobody reads or writes them.

One file for each floor, and in it, for each op, (label, function of a dtype that builds the
arguments of the op's schema). An op without a launcher may have calls; they wait.
"""

from __future__ import annotations

from tools.calls import attention, loss, mlp, norm, rope
from tools.calls.shapes import Build

CALLS: dict[str, list[tuple[str, Build]]] = {
    **attention.CALLS,
    **loss.CALLS,
    **mlp.CALLS,
    **norm.CALLS,
    **rope.CALLS,
}
