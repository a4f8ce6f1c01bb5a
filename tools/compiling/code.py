"""Machine code as a list of instructions: its loops, and what of it is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# bits that one thread reads or writes of global memory by one instruction, widest first
WIDTHS = (256, 128, 96, 64, 32, 16, 8)


@dataclass(frozen=True)
class Instruction:
    """target: the label it may jump to. falls: whether the next instruction may follow it."""

    opcode: str
    target: str | None = None
    falls: bool = True


@dataclass
class Code:
    """labels: the index of the instruction that each label stands before."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Counts:
    """What is kept of one compiled kernel. Loads and stores of global memory are by their width.

    loop: instructions of the longest innermost loop. loop_loads: of the longest loop of all, which
    in a product holds loops that wait for its copies.
    """

    registers: int
    local: int
    spill_loads: int
    spill_stores: int
    shared: int
    instructions: int
    loop: int
    loop_loads: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    tensor: dict[str, int]


def loops(code: Code) -> list[frozenset[int]]:
    """The natural loops, each as the indices of its instructions.

    A jump backwards is no loop by itself: compilers move what is rarely run behind the last exit,
    from where it jumps back into the middle. It closes a loop only where its target is on every
    path that leads to it.
    """
    blocks, at = _blocks(code)
    if not blocks:
        return []
    after = [_successors(code, block, at) for block in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(after):
        for other in following:
            before[other].append(block)
    above = _dominators(before)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(after):
        for head in following:
            if above[block] >> head & 1:
                bodies.setdefault(head, {head}).update(_body(head, block, before))
    return [frozenset(i for b in body for i in range(*blocks[b])) for body in bodies.values()]


def innermost(code: Code, counts: Callable[[Instruction], bool]) -> int:
    """Instructions in the longest of the loops that hold no other loop; 0 where there is none."""
    found = loops(code)
    inner = (loop for loop in found if not any(other < loop for other in found))
    return max((sum(counts(code.instructions[i]) for i in loop) for loop in inner), default=0)


def longest(code: Code) -> list[Instruction]:
    """The instructions of the longest loop."""
    body = max(loops(code), key=len, default=frozenset[int]())
    return [code.instructions[i] for i in sorted(body)]


def _blocks(code: Code) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Runs of instructions with one entry and one exit, and the block that starts at an index."""
    n = len(code.instructions)
    starts = {0, *code.labels.values()}
    for index, instruction in enumerate(code.instructions):
        if instruction.target is not None or not instruction.falls:
            starts.add(index + 1)
    bounds = sorted(start for start in starts if start < n)
    blocks = list(zip(bounds, [*bounds[1:], n]))
    return blocks, {start: number for number, (start, _) in enumerate(blocks)}


def _successors(code: Code, block: tuple[int, int], at: dict[int, int]) -> list[int]:
    last = code.instructions[block[1] - 1]
    found = [at[block[1]]] if last.falls and block[1] in at else []
    jump = code.labels.get(last.target) if last.target is not None else None
    # a jump to itself is what the assembler fills up the end of a kernel with
    if jump in at and not (jump == block[0] and block[1] - block[0] == 1):
        found.append(at[jump])
    return found


def _dominators(before: Sequence[Sequence[int]]) -> list[int]:
    """For each block the set, as bits, of those that every path to it passes, itself included."""
    everything = (1 << len(before)) - 1
    above = [everything] * len(before)
    above[0] = 1
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            common = everything
            for other in before[block]:
                common &= above[other]
            common |= 1 << block
            changed |= common != above[block]
            above[block] = common
    return above


def _body(head: int, last: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which last is reached without passing head."""
    body, waiting = {head, last}, [last] if last != head else []
    while waiting:
        for other in before[waiting.pop()]:
            if other not in body:
                body.add(other)
                waiting.append(other)
    return body


def by_width(widths: Counter[int]) -> dict[str, int]:
    return {str(width): widths[width] for width in WIDTHS if widths[width]}
