"""Instructions that all lanes of a warp execute together."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.access import address_of
from ptx.arithmetic import Array, Run, getter
from ptx.program import Instruction, PtxError, names

LANES = np.arange(32)
GROUP, THREAD = LANES >> 2, LANES & 3
# PTX ISA, "Matrix fragments for mma.m16n8k16": rows and columns of each element of a lane
EIGHT, FOUR = np.arange(8), np.arange(4)
A_ROWS = GROUP[:, None] + 8 * (EIGHT // 2 % 2)
A_COLUMNS = 2 * THREAD[:, None] + EIGHT % 2 + 8 * (EIGHT // 4)
B_ROWS = 2 * THREAD[:, None] + FOUR % 2 + 8 * (FOUR // 2)
B_COLUMNS = np.repeat(GROUP[:, None], 4, 1)
D_ROWS, D_COLUMNS = GROUP[:, None] + 8 * (FOUR // 2), 2 * THREAD[:, None] + FOUR % 2


def _numbers(words: Array, kind: str) -> Array:
    """[..., n] words as [..., 2 n] numbers, the lower half of a word first."""
    shorts = np.ascontiguousarray(words).view(np.uint16)
    if kind == "f16":
        return shorts.view(np.float16).astype(np.float32)
    return (shorts.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _product(instruction: Instruction) -> Run:
    kind = instruction.kinds[-2]
    if instruction.kinds != ("sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32"):
        raise PtxError(f"not known: {instruction}")
    to, *sources = map(names, instruction.operands)

    def words(block: Any, registers: list[str], warps: Array) -> Array:
        rows = [block.registers[name].reshape(-1, 32)[warps] for name in registers]
        return np.stack(rows, -1)

    def multiply(block: Any, on: Any) -> None:
        warps = block.warps(on)
        a, b, c = (words(block, registers, warps) for registers in sources)
        left = np.empty((len(warps), 16, 16), np.float32)
        right, total = np.empty((2, len(warps), 16, 8), np.float32)
        left[:, A_ROWS, A_COLUMNS] = _numbers(a, kind)
        right[:, B_ROWS, B_COLUMNS] = _numbers(b, kind)
        total[:, D_ROWS, D_COLUMNS] = c.view(np.float32)
        result = (total + left @ right)[:, D_ROWS, D_COLUMNS]
        for i, name in enumerate(to):
            bits = np.ascontiguousarray(result[..., i]).view(np.uint32)
            block.registers[name].reshape(-1, 32)[warps] = bits

    return multiply


def _matrices(instruction: Instruction) -> Run:
    kinds = [kind for kind in instruction.kinds if kind != "trans"]
    if kinds != ["sync", "aligned", "m8n8", "x4", "shared", "b16"]:
        raise PtxError(f"not known: {instruction}")
    registers, address = names(instruction.operands[0]), address_of(instruction.operands[1])
    transposed = "trans" in instruction.kinds

    def load(block: Any, on: Any) -> None:
        warps, lanes = block.warps(on), block.lanes(on)
        offset = block.shared.offsets(address(block)[lanes], 16)
        block.shared.judge(offset, 16, lanes, False)
        rows = block.shared.bytes[offset[:, None] + np.arange(16)].view(np.uint16)
        matrices = rows.reshape(len(warps), 4, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), 4, 32)
        for i, name in enumerate(registers):
            block.registers[name].reshape(-1, 32)[warps] = words[:, i]

    return load


def _shuffle(instruction: Instruction) -> Run:
    if instruction.kinds != ("sync", "bfly", "b32"):
        raise PtxError(f"not known: {instruction}")
    to, source, *rest = instruction.operands
    name = to.partition("|")[0]
    get, (by, clamp, members) = getter(source, "b32"), (getter(o, "u32") for o in rest)

    def shuffle(block: Any, on: Any) -> None:
        warps, lanes = block.warps(on), block.lanes(on)
        for get_word, word in ((clamp, 31), (members, 0xFFFFFFFF)):
            if (np.broadcast_to(get_word(block), block.threads)[lanes] != word).any():
                raise PtxError("a shuffle of some lanes")
        every = np.arange(block.threads)
        partner = every ^ np.broadcast_to(by(block), block.threads).astype(np.int64)
        if (partner[lanes] // 32 != lanes // 32).any():
            raise PtxError("a shuffle with another warp")
        partner = np.where(partner < block.threads, partner, every)
        value = np.broadcast_to(get(block), block.threads)[partner].reshape(-1, 32)
        block.registers[name].reshape(-1, 32)[warps] = value[warps]

    return shuffle


def compiled(instruction: Instruction) -> Run | None:
    if instruction.name == "bar" and instruction.kinds == ("warp", "sync"):
        return lambda block, on: None  # lanes have met
    known = {"mma": _product, "ldmatrix": _matrices, "shfl": _shuffle}
    return known[instruction.name](instruction) if instruction.name in known else None
