"""Instructions that touch memory: loads, stores, counts, asynchronous copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.arithmetic import Array, Run, dtype_of, getter, putter
from ptx.memory import COUNTERS, INPUT, RESULT, Region, cells_of
from ptx.program import BITS, Instruction, PtxError, names


def address_of(operand: str) -> Any:
    base, _, offset = operand.strip("[]").partition("+")
    bits = "b64" if base.startswith(("%rd", "_")) else "b32"
    get, by = getter(base, bits), int(offset or 0)

    def address(block: Any) -> Array:
        return np.broadcast_to(get(block).astype(np.int64) + by, block.threads)

    return address


def _checked(block: Any, region: Region, offset: Array, size: int, write: bool) -> None:
    if region.access == COUNTERS:
        raise PtxError(f"a plain access to {region.name}")
    if region.access == INPUT:
        if write:
            raise PtxError(f"a write to {region.name}, which is an input")
        return
    assert region.access == RESULT
    cells = cells_of(offset, size)
    block.order.judge(region, cells, write)
    if write:
        region.writer[cells] = block.number
        block.order.write()


def _read(block: Any, space: str, address: Array, size: int, lanes: Array) -> Array:
    """[lanes, size] bytes."""
    span = np.arange(size)
    if space == "param":
        return block.parameters[address[:, None] + span]
    if space == "shared":
        offset = block.shared.offsets(address, size)
        block.shared.judge(offset, size, lanes, False)
        return block.shared.bytes[offset[:, None] + span]
    out = np.empty((len(address), size), np.uint8)
    for region, which in block.device.find(address, size):
        offset = address[which] - region.begin
        _checked(block, region, offset, size, False)
        out[which] = region.bytes[offset[:, None] + span]
    return out


def _write(block: Any, space: str, address: Array, data: Array, lanes: Array) -> None:
    size = data.shape[1]
    span = np.arange(size)
    if space == "shared":
        offset = block.shared.offsets(address, size)
        block.shared.judge(offset, size, lanes, True)
        block.shared.bytes[offset[:, None] + span] = data
        return
    for region, which in block.device.find(address, size):
        offset = address[which] - region.begin
        _checked(block, region, offset, size, True)
        region.bytes[offset[:, None] + span] = data[which]


def _load(instruction: Instruction) -> Run:
    space, kind = instruction.kinds[0], instruction.kinds[-1]
    to, source = instruction.operands
    registers, dtype, address = names(to), dtype_of(kind), address_of(source)
    size = BITS[kind] // 8 * len(registers)

    def load(block: Any, on: Any) -> None:
        lanes = block.lanes(on)
        values = _read(block, space, address(block)[lanes], size, lanes).view(dtype)
        for i, name in enumerate(registers):
            register = block.registers[name]
            value = values[:, i]
            register[lanes] = (
                value.view(register.dtype)
                if value.itemsize == register.itemsize
                else value.astype(register.dtype)
            )

    return load


def _store(instruction: Instruction) -> Run:
    space, kind = instruction.kinds[0], instruction.kinds[-1]
    to, source = instruction.operands
    registers, address = names(source), address_of(to)
    bits = BITS[kind]

    def value_of(name: str) -> Any:
        if not name.startswith("%"):
            return getter(name, kind)
        narrow = np.dtype(f"u{bits // 8}")
        return lambda block: block.registers[name].astype(narrow, copy=False)

    gets = [value_of(name) for name in registers]

    def store(block: Any, on: Any) -> None:
        lanes = block.lanes(on)
        columns = [np.broadcast_to(get(block), block.threads)[lanes] for get in gets]
        data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        _write(block, space, address(block)[lanes], data, lanes)

    return store


def _atomic(instruction: Instruction) -> Run:
    if instruction.kinds not in (("global", "inc", "u32"), ("global", "add", "u32")):
        raise PtxError(f"not known: {instruction}")
    wraps = "inc" in instruction.kinds
    put, address = putter(instruction.operands[0]), address_of(instruction.operands[1])
    get = getter(instruction.operands[2], "u32")

    def count(block: Any, on: Any) -> None:
        before = np.zeros(block.threads, np.uint32)
        most = np.broadcast_to(get(block), block.threads)
        for lane in block.lanes(on):
            ((region, _),) = block.device.find(address(block)[lane : lane + 1], 4)
            if region.access != COUNTERS:
                raise PtxError(f"a count in {region.name}")
            at = int(address(block)[lane]) - region.begin
            word = region.bytes[at : at + 4].view(np.uint32)
            before[lane] = word[0]
            after = int(word[0]) + (1 if wraps else int(most[lane]))
            word[0] = 0 if wraps and word[0] >= most[lane] else after % 2**32
            block.order.count()
        put(block, before, on)

    return count


def _copy(instruction: Instruction) -> Run:
    """A copy lands when it is waited for, and nobody may touch its place before."""
    if instruction.kinds[1] == "commit_group":
        return lambda block, on: block.commit(block.lanes(on))
    if instruction.kinds[1] == "wait_group":
        left = int(instruction.operands[0])
        return lambda block, on: block.wait(block.lanes(on), left)
    if instruction.kinds != ("async", "cg", "shared", "global"):
        raise PtxError(f"not known: {instruction}")
    to, source = map(address_of, instruction.operands[:2])
    size, get = int(instruction.operands[2]), getter(instruction.operands[3], "u32")

    def copy(block: Any, on: Any) -> None:
        lanes = block.lanes(on)
        read = np.broadcast_to(get(block), block.threads)[lanes]
        if (read > size).any():
            raise PtxError("a copy of more than it copies")
        offset = block.shared.offsets(to(block)[lanes], size)
        cells = block.shared.judge(offset, size, lanes, True)
        data, wanted = np.zeros((len(lanes), size), np.uint8), read > 0
        from_address = source(block)[lanes]
        data[wanted] = _read(block, "global", from_address[wanted], size, lanes[wanted])
        data[np.arange(size) >= read[:, None]] = 0
        np.add.at(block.shared.copying, cells, 1)
        block.copy(lanes, offset, cells, data)

    return copy


def compiled(instruction: Instruction) -> Run | None:
    name = instruction.name
    if name == "ld":
        return _load(instruction)
    if name == "st":
        return _store(instruction)
    if name == "atom":
        return _atomic(instruction)
    if name == "cp":
        return _copy(instruction)
    if name == "membar":
        if instruction.kinds == ("cta",):
            return lambda block, on: None  # of no use to another block
        if instruction.kinds != ("gl",):
            raise PtxError(f"not known: {instruction}")
        return lambda block, on: block.order.fence()
    return None
