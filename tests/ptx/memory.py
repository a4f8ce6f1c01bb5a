"""Memory as a kernel sees it: what the emulator was told of, and the shared memory of a block."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ptx.program import PtxError

Array = np.ndarray
INPUT, RESULT, COUNTERS = range(3)
# where shared memory begins: addresses below are nobody's
SHARED = 0x400
# what is remembered of memory is remembered of pieces of so many bytes
CELL = 2
NOBODY, EARLIER = -2, -1


@dataclass
class Region:
    name: str
    begin: int
    size: int
    access: int

    def __post_init__(self) -> None:
        self.bytes = np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.begin), np.uint8)
        cells = self.size // CELL + 1 if self.access == RESULT else 0
        # the block of this launch that wrote a cell last
        self.writer = np.full(cells, NOBODY, np.int32)


class Device:
    """All regions of a call; inputs that overlap are one."""

    def __init__(self, regions: list[tuple[str, int, int, int]]) -> None:
        merged: list[list] = []
        for name, begin, size, access in sorted(regions, key=lambda r: r[1]):
            last = merged[-1] if merged else None
            if last is not None and begin < last[1] + last[2] and access == last[3] == INPUT:
                last[2] = max(last[2], begin + size - last[1])
                last[0] += f" and {name}"
            else:
                merged.append([name, begin, size, access])
        self.regions = [Region(*r) for r in merged]
        self.begins = np.array([r.begin for r in self.regions], np.int64)
        self.ends = np.array([r.begin + r.size for r in self.regions], np.int64)

    def begin_launch(self) -> None:
        for region in self.regions:
            region.writer[region.writer >= 0] = EARLIER

    def find(self, address: Array, size: int) -> list[tuple[Region, Array]]:
        """The regions of accesses of so many bytes, and which of the accesses are theirs."""
        if (address % size).any():
            raise PtxError(f"an unaligned access of {size} bytes")
        at = np.searchsorted(self.begins, address, "right") - 1
        outside = (at < 0) | (address + size > self.ends[at])
        if outside.any():
            near = self.regions[int(at[outside][0])].name
            raise PtxError(f"an access of {size} bytes outside of everything, behind {near}")
        return [(self.regions[i], np.flatnonzero(at == i)) for i in np.unique(at)]

    def symbol(self, name: str) -> int:
        """Counters that the library has itself, by their mangled name."""
        for region in self.regions:
            if f"{len(region.name)}{region.name}E" in name:
                return region.begin
        raise PtxError(f"not known: {name}")


class Order:
    """What of other blocks one may read: what was fenced, counted, and fenced again."""

    def __init__(self) -> None:
        self.given: set[int] = set()

    def begin_block(self, block: int) -> None:
        self.block, self.fenced, self.counted, self.taken = block, False, False, False

    def write(self) -> None:
        self.fenced = False

    def fence(self) -> None:
        self.fenced, self.taken = True, self.counted

    def count(self) -> None:
        if self.fenced:
            self.given.add(self.block)
        self.counted = True

    def judge(self, region: Region, cells: Array, write: bool) -> None:
        writers = region.writer[cells]
        others = np.unique(writers[(writers >= 0) & (writers != self.block)])
        if len(others) and not (self.taken and self.given.issuperset(others.tolist())):
            word = "written" if write else "read"
            raise PtxError(f"a race: {region.name} is {word}, which another block has written")
        if not write and (writers == NOBODY).any():
            raise PtxError(f"{region.name} is read, which nobody has written")


def cells_of(offset: Array, size: int) -> Array:
    return (offset[:, None] + np.arange(0, size, min(size, CELL))) // CELL


class Shared:
    """Of a block. A barrier ends a round, and only it orders warps."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        cells = size // CELL + 1
        self.written = np.zeros(cells, bool)
        self.copying = np.zeros(cells, np.int32)
        self.write_round, self.read_round = np.full((2, cells), -1)
        self.write_warp, self.read_warp = np.full((2, cells), -1)
        self.round = 0

    def offsets(self, address: Array, size: int) -> Array:
        if (address % size).any():
            raise PtxError(f"an unaligned access of {size} bytes")
        offset = address.astype(np.int64) - SHARED
        if (offset < 0).any() or (offset + size > len(self.bytes)).any():
            raise PtxError(f"an access of {size} bytes outside of shared memory")
        return offset

    def judge(self, offset: Array, size: int, lanes: Array, write: bool) -> Array:
        cells = cells_of(offset, size)
        warp = np.broadcast_to((lanes // 32)[:, None], cells.shape)
        if self.copying[cells].any():
            raise PtxError("an access to shared memory where a copy is under way")
        if not write and not self.written[cells].all():
            raise PtxError("shared memory is read, which nobody has written")
        if ((self.write_round[cells] == self.round) & (self.write_warp[cells] != warp)).any():
            raise PtxError("a race: shared memory that another warp has written")
        if write:
            read_by = (self.read_round[cells] == self.round) & (self.read_warp[cells] != warp)
            if read_by.any():
                raise PtxError("a race: shared memory is written that another warp has read")
            self.write_round[cells], self.write_warp[cells] = self.round, warp
            self.written[cells] = True
        else:
            several = (self.read_round[cells] == self.round) & (self.read_warp[cells] != warp)
            self.read_round[cells] = self.round
            self.read_warp[cells] = np.where(several, -2, warp)
        return cells
