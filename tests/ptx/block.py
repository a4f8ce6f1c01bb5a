"""A block: its threads, where each of them is, and who goes on next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import access, arithmetic, warp
from ptx.arithmetic import UNSIGNED, Array
from ptx.memory import SHARED, Device, Order, Shared
from ptx.program import Instruction, Program, PtxError

TOGETHER = ("mma", "ldmatrix", "shfl", "bar")
END = 1 << 40


@dataclass
class Copies:
    """Of one instruction: a row for each of its lanes."""

    lanes: Array
    group: Array
    offset: Array
    cells: Array
    data: Array


def turns(instruction: Instruction) -> bool:
    """Whether it says where threads go on, or that they wait."""
    whole = instruction.name == "bar" and "warp" not in instruction.kinds
    return whole or instruction.name in ("bra", "ret")


class Block:
    def __init__(
        self, program: Program, device: Device, order: Order, parameters: Array, number: int,
        place: tuple[int, int, int], grid: tuple[int, int, int], threads: int, shared: int,
    ) -> None:  # fmt: skip
        self.program, self.device, self.order, self.parameters = program, device, order, parameters
        self.number, self.threads, self.shared = number, threads, Shared(shared)
        self.registers = {n: np.zeros(threads, UNSIGNED[b]) for n, b in program.registers.items()}
        self.special: dict[str, Array] = {"%tid.x": np.arange(threads, dtype=np.uint32)}
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.array([place[i]], np.uint32)
            self.special[f"%nctaid.{axis}"] = np.array([grid[i]], np.uint32)
            self.special[f"%ntid.{axis}"] = np.array([1 if i else threads], np.uint32)
        self.at = np.zeros(threads, np.int64)
        self.done, self.waits = np.zeros((2, threads), bool)
        # the instruction of a warp where a lane waits for the others
        self.meets = np.full(threads, -1, np.int64)
        self.groups = np.zeros(threads, np.int64)
        self.copies: list[Copies] = []
        self.every = np.arange(threads)
        order.begin_block(number)

    def symbol(self, name: str) -> int:
        if name == self.program.parameter:
            return 0
        return SHARED if name.endswith("6sharedE") else self.device.symbol(name)

    def lanes(self, on: Array | None) -> Array:
        return self.every if on is None else np.flatnonzero(on)

    def warps(self, on: Array | None) -> Array:
        return np.arange(self.threads // 32) if on is None else np.flatnonzero(on[::32])

    # asynchronous copies

    def copy(self, lanes: Array, offset: Array, cells: Array, data: Array) -> None:
        self.copies.append(Copies(lanes, self.groups[lanes], offset, cells, data))

    def commit(self, lanes: Array) -> None:
        self.groups[lanes] += 1

    def wait(self, lanes: Array, left: int) -> None:
        """What is in no group yet is not waited for."""
        waiting = np.zeros(self.threads, bool)
        waiting[lanes] = True
        kept = []
        for c in self.copies:
            lands = waiting[c.lanes] & (c.group < self.groups[c.lanes] - left)
            shared, cells = self.shared, c.cells[lands]
            shared.bytes[c.offset[lands][:, None] + np.arange(c.data.shape[1])] = c.data[lands]
            np.subtract.at(shared.copying, cells, 1)
            shared.write_round[cells] = shared.round
            shared.write_warp[cells] = (c.lanes[lands] // 32)[:, None]
            if not lands.all():
                parts = (c.lanes, c.group, c.offset, c.cells, c.data)
                kept.append(Copies(*(x[~lands] for x in parts)))
        self.copies = kept

    # who goes on

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while not self.done.all():
                able = ~self.done & ~self.waits & (self.meets < 0)
                if able.any():
                    self.stretch(able)
                else:
                    self.release()
        if self.copies:
            raise PtxError("copies that nobody has waited for")

    def release(self) -> None:
        """Nobody can go on: a barrier that all have reached lets them."""
        if (self.meets >= 0).any():
            at = self.program.instructions[int(self.meets.max())]
            raise PtxError(f"lanes of a warp part at {at}")
        if self.done.any() or len(np.unique(self.at)) > 1:
            raise PtxError("a barrier that some threads do not reach")
        self.waits[:] = False
        self.shared.round += 1

    def stretch(self, able: Array) -> None:
        """The threads that are furthest behind, until they meet those ahead of them."""
        at = int(self.at[able].min())
        group = able & (self.at == at)
        ahead = self.at[able & ~group]
        stop = int(ahead.min()) if len(ahead) else END
        on = None if group.all() else group
        instructions, compiled = self.program.instructions, code_of(self.program)
        while at < stop:
            instruction = instructions[at]
            active = self.guarded(instruction, on)
            if turns(instruction):
                self.at[group] = at + 1
                self.turn(instruction, self.all_of(active))
                # all of them somewhere else: go on there
                if instruction.name == "bra" and stop == END and (active is on or on is None):
                    moved = self.at[group]
                    if (moved == moved[0]).all():
                        at = int(moved[0])
                        continue
                return
            if instruction.name in TOGETHER and not self.gathered(instruction, at, group, active):
                return
            try:
                if active is None or active.any():
                    compiled[at](self, active)
            except PtxError as error:
                raise PtxError(f"{error} ({instruction})") from None
            at += 1
        self.at[group] = at

    def all_of(self, active: Array | None) -> Array:
        return np.ones(self.threads, bool) if active is None else active

    def guarded(self, instruction: Instruction, on: Array | None) -> Array | None:
        if instruction.predicate is None:
            return on
        holds = self.registers[instruction.predicate] ^ instruction.negated
        return holds if on is None else on & holds

    def turn(self, instruction: Instruction, active: Array) -> None:
        if instruction.name == "bra":
            self.at[active] = self.program.labels[instruction.operands[-1]]
        elif instruction.name == "ret":
            self.done |= active
        elif instruction.kinds == ("sync",) and instruction.operands == ("0",):
            self.waits |= active
        else:
            raise PtxError(f"not known: {instruction}")

    def gathered(
        self, instruction: Instruction, at: int, group: Array, active: Array | None
    ) -> bool:
        """Whether whole warps are here; else those that are not wait for the other lanes."""
        if active is None:
            return True
        if instruction.predicate is not None:
            raise PtxError(f"not known: {instruction}")
        rows = active.reshape(-1, 32)
        missing = rows.any(1) & ~rows.all(1)
        if not missing.any():
            return True
        self.at[group] = at
        self.meets[group & np.repeat(missing, 32)] = at
        for warp_number in np.flatnonzero(missing):
            lanes = slice(32 * warp_number, 32 * warp_number + 32)
            if (self.meets[lanes] == at).all():
                self.meets[lanes] = -1
        return False


def _compiled(instruction: Instruction) -> Any:
    if turns(instruction):
        return None
    for module in (access, warp, arithmetic):
        if (run := module.compiled(instruction)) is not None:
            return run
    raise PtxError(f"not known: {instruction}")


def code_of(program: Program) -> list[Any]:
    if not program.compiled:
        program.compiled = [_compiled(instruction) for instruction in program.instructions]
    return program.compiled
