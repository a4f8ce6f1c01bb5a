"""Instructions that take registers and give registers, each lane for itself."""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.program import BITS, Instruction, PtxError, names

Array = np.ndarray
# a value of an operand for a block; what an instruction does to a block
Get = Callable[[Any], Array]
Run = Callable[[Any, Any], None]
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}


def dtype_of(kind: str) -> Any:
    if kind == "f32":
        return np.float32
    return SIGNED[BITS[kind]] if kind[0] == "s" else UNSIGNED[BITS[kind]]


def constant(text: str, bits: int) -> Array:
    if text.startswith("0f"):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), np.uint32)
    if bits == 1:
        return np.array([int(text) != 0])
    return np.array([int(text, 0) % 2**bits], UNSIGNED[bits])


def getter(operand: str, kind: str, wider: bool = False) -> Get:
    """The operand as an array of this type; constants are arrays of one.

    wider: of a wider register its lowest bits count, as the PTX manual has it for cvt of integers.
    """
    bits, dtype = BITS[kind], dtype_of(kind)
    if operand.startswith(("%tid", "%ntid", "%ctaid", "%nctaid")):
        return lambda block: block.special[operand]
    if operand.startswith("%"):

        def register(block: Any) -> Array:
            value = block.registers[operand]
            if value.dtype == dtype:
                return value
            if wider and value.itemsize > np.dtype(dtype).itemsize:
                return value.astype(UNSIGNED[bits]).view(dtype)
            if value.itemsize != np.dtype(dtype).itemsize:
                raise PtxError(f"{operand} is not {kind}")
            return value.view(dtype)

        return register
    if operand.startswith("0f") or re.fullmatch(r"-?\d\w*", operand):
        value = constant(operand, bits).view(dtype)
        return lambda block: value
    return lambda block: np.array([block.symbol(operand)], UNSIGNED[bits])


def putter(operand: str) -> Callable[[Any, Array, Any], None]:
    def put(block: Any, value: Array, on: Any) -> None:
        register = block.registers[operand]
        if value.dtype != register.dtype:
            same = value.itemsize == register.itemsize
            value = value.view(register.dtype) if same else value.astype(register.dtype)
        np.copyto(register, value, where=True if on is None else on)

    return put


def bfloat16(x: Array) -> Array:
    """Bits of float32, rounded to the nearest, of two the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    short = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), short)


def _divided(a: Array, b: Array) -> Array:
    wide, by = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return (np.sign(wide) * np.sign(by) * (np.abs(wide) // np.abs(by))).astype(a.dtype)


def _shifted(a: Array, by: Array, left: bool) -> Array:
    """Beyond the width: zeros, or the sign."""
    bits, signed = 8 * a.itemsize, a.dtype.kind == "i"
    by = by.astype(np.int64)
    moved = np.minimum(by, bits - 1).astype(a.dtype)
    value = a << moved if left else a >> moved
    return value if signed and not left else np.where(by >= bits, a.dtype.type(0), value)


def _wide(a: Array) -> Array:
    return a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)


def _high(a: Array, b: Array) -> Array:
    assert a.itemsize == 4
    return (_wide(a) * _wide(b) >> _wide(a).dtype.type(32)).astype(a.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _copysign(sign: Array, value: Array) -> Array:
    return np.copysign(value, sign)


FLOATS: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "fma": _fma,
    "div": operator.truediv, "neg": operator.neg, "abs": np.abs, "min": np.fmin, "max": np.fmax,
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: np.float32(1) / x, "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x), "copysign": _copysign, "tanh": np.tanh,
}  # fmt: skip
WHOLES: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "min": np.minimum, "max": np.maximum,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "neg": operator.neg, "div": _divided, "rem": lambda a, b: a - _divided(a, b) * b,
    "abs": np.abs,
}  # fmt: skip
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal}  # fmt: skip


def _compare(kinds: tuple[str, ...]) -> Callable[..., Array]:
    word = kinds[0]
    if kinds[-1] != "f32":
        return COMPARE[word]
    if word in COMPARE:
        # of a number and no number nothing holds
        return lambda a, b: COMPARE[word](a, b) & ~(np.isnan(a) | np.isnan(b))
    if word[:-1] in COMPARE and word[-1] == "u":
        return lambda a, b: COMPARE[word[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    raise PtxError(f"not known: setp.{word}")


def _convert(to: str, source: str, kinds: tuple[str, ...]) -> Callable[[Array], Array]:
    if source == "f32" and to == "f32":
        if "rzi" not in kinds:
            raise PtxError(f"not known: cvt.{'.'.join(kinds)}")
        return np.trunc
    if source == "f32" and to == "bf16":
        return bfloat16
    if source == "f32" and to == "f16":
        return lambda x: x.astype(np.float16).view(np.uint16)
    if source == "f16" and to == "f32":
        return lambda x: x.view(np.float16).astype(np.float32)
    if source == "bf16" and to == "f32":
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if source == "f32" and to not in ("f32", "f16", "bf16") and "rzi" not in kinds:
        raise PtxError(f"not known: cvt.{'.'.join(kinds)}")
    return lambda x: x.astype(dtype_of(to))


def _inserted(a: Array, b: Array, at: Array, size: Array) -> Array:
    """b, in which the lowest bits of a stand from `at` on."""
    one = b.dtype.type(1)
    at, size = at.astype(b.dtype), size.astype(b.dtype)
    mask = ((one << size) - one) << at
    return b & ~mask | a << at & mask


def _parts(instruction: Instruction) -> Run | None:
    """mov between a register and several that are its parts."""
    to, source = instruction.operands
    kind = instruction.kinds[-1]
    if to.startswith("{"):
        puts = [putter(name) for name in names(to)]
        bits, get = BITS[kind] // len(puts), getter(source, f"b{BITS[kind]}")

        def split(block: Any, on: Any) -> None:
            value = get(block)
            for i, put in enumerate(puts):
                part = value >> value.dtype.type(bits * i) & value.dtype.type(2**bits - 1)
                put(block, part.astype(UNSIGNED[bits]), on)

        return split
    if source.startswith("{"):
        words = names(source)
        bits, put = BITS[kind] // len(words), putter(to)
        gets, dtype = [getter(word, f"b{bits}") for word in words], UNSIGNED[BITS[kind]]

        def join(block: Any, on: Any) -> None:
            parts = [g(block).astype(dtype) << dtype(bits * i) for i, g in enumerate(gets)]
            value = parts[0]
            for part in parts[1:]:
                value = value | part
            put(block, value, on)

        return join
    return None


def _apply(instruction: Instruction, function: Callable[..., Array], *kinds: str) -> Run:
    put = putter(instruction.operands[0].partition("|")[0])
    wider = instruction.name == "cvt" and kinds[0][0] in "su"
    gets = [getter(o, kind, wider) for o, kind in zip(instruction.operands[1:], kinds, strict=True)]
    if len(gets) == 1:
        (only,) = gets
        return lambda block, on: put(block, function(only(block)), on)
    if len(gets) == 2:
        first, second = gets
        return lambda block, on: put(block, function(first(block), second(block)), on)
    return lambda block, on: put(block, function(*(get(block) for get in gets)), on)


def compiled(instruction: Instruction) -> Run | None:
    """What it does; None where it is not one of these."""
    name, kinds, kind = instruction.name, instruction.kinds, (instruction.kinds or ("",))[-1]
    count = len(instruction.operands) - 1
    if name in ("mov", "cvta"):
        return _parts(instruction) or _apply(instruction, lambda x: x, kind)
    if name == "cvt" and kind != kinds[0] and "x2" not in kinds[-2]:
        return _apply(instruction, _convert(kinds[-2], kind, kinds), kind)
    if name == "setp" and len(kinds) == 2:
        return _apply(instruction, _compare(kinds), kind, kind)
    if name == "selp":
        return _apply(instruction, lambda a, b, p: np.where(p, a, b), kind, kind, "pred")
    if name in ("shl", "shr"):
        return _apply(instruction, lambda a, b: _shifted(a, b, name == "shl"), kind, "u32")
    if name in ("mul", "mad") and kind != "f32":
        how = {"wide": lambda a, b: _wide(a) * _wide(b), "lo": operator.mul, "hi": _high}[kinds[0]]
        if name == "mul":
            return _apply(instruction, how, kind, kind)
        third = kind if kinds[0] != "wide" else f"{kind[0]}64"
        return _apply(instruction, lambda a, b, c: how(a, b) + c, kind, kind, third)
    if name == "bfi":
        return _apply(instruction, _inserted, kind, kind, "u32", "u32")
    table = FLOATS if kind == "f32" else WHOLES
    if name in table and kind in BITS:
        return _apply(instruction, table[name], *[kind] * count)
    return None
