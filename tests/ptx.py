"""One warp's PTX executed by numpy: what nvcc emits for small kernels, inline assembly included.

Only what the wrappers of csrc/cuda/gpu.h need: branches go forward, words have 32 or 64 bits. A
copy lands when it is waited for. An instruction that is not known raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch

LANES = np.arange(32)
IN, OUT, SHARED = 0x10000, 0x20000, 0x100
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
Words = np.ndarray


def entries(text: str) -> dict[str, str]:
    """The body of each kernel, by its name."""
    found = re.findall(r"\.entry\s+(\w+)\(.*?\n\{\n(.*?)\n\}\n", text, flags=re.S)
    return {name: body.replace("// begin inline asm", "").replace("// end inline asm", "")
            for name, body in found}  # fmt: skip


@dataclass
class Warp:
    memory: Words
    values: dict[str, Words] = field(default_factory=dict)
    copies: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    groups: int = 0

    def get(self, operand: str) -> Words:
        if operand.startswith("%tid.x"):
            return LANES.astype(np.uint64)
        if operand.startswith("%"):
            return self.values[operand]
        if operand.startswith("0f"):
            return np.full(32, int(operand[2:], 16), np.uint64)
        if re.fullmatch(r"-?\d+", operand):
            return np.full(32, int(operand) % 2**64, np.uint64)
        return np.full(32, SHARED, np.uint64)  # the one array there is

    def put(self, name: str, value: Words, active: Words, bits: int) -> None:
        value = value.astype(np.uint64) & np.uint64(2**bits - 1)
        self.values[name] = np.where(active, value, self.values.get(name, np.zeros_like(value)))

    def address(self, operand: str) -> Words:
        base, _, offset = operand.strip("[]").partition("+")
        return self.get(base) + np.uint64(int(offset or 0))

    def load(self, address: int, words: int = 1) -> Words:
        return self.memory[address : address + 4 * words].view(np.uint32).astype(np.uint64)

    def store(self, address: int, words: Words) -> None:
        self.memory[address : address + 4 * len(words)] = words.astype(np.uint32).view(np.uint8)


def signed(x: Words) -> Words:
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


def floats(x: Words) -> Words:
    return x.astype(np.uint32).view(np.float32)


def bits(x: Words) -> Words:
    return x.astype(np.float32).view(np.uint32).astype(np.uint64)


def shorts(words: Words) -> Words:
    """[32, n] words as [32, 2n] elements of 16 bits, the lower half of a word first."""
    low, high = words & np.uint64(0xFFFF), words >> np.uint64(16)
    return np.stack([low, high], -1).reshape(32, -1)


def numbers(elements: Words, kind: str) -> Words:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(elements.astype(np.uint16).view(np.int16)).view(dtype).double().numpy()


def matrix_product(a: Words, b: Words, c: Words, kind: str) -> Words:
    """PTX ISA, "Matrix fragments for mma.m16n8k16": rows and columns by groupID and threadID."""
    group, thread = LANES >> 2, LANES & 3
    left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i, column in enumerate(numbers(shorts(a), kind).T):
        row = group + np.where(i in (0, 1, 4, 5), 0, 8)
        left[row, thread * 2 + (i & 1) + np.where(i >= 4, 8, 0)] = column
    for i, column in enumerate(numbers(shorts(b), kind).T):
        right[thread * 2 + (i & 1) + np.where(i >= 2, 8, 0), group] = column
    for i, column in enumerate(floats(c).T):
        total[group + np.where(i >= 2, 8, 0), thread * 2 + (i & 1)] = column
    total += left @ right
    return np.stack([total[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)]
                     for i in range(4)], 1)  # fmt: skip


def names(operand: str) -> list[str]:
    return re.findall(r"%\w+", operand)


def run(body: str, given: Words, words_out: int) -> Words:
    """What a kernel of (in, out) writes; out and shared memory hold 0xff before."""
    warp = Warp(np.full(OUT + 4 * words_out, 0xFF, np.uint8))
    warp.store(IN, given.astype(np.uint64))
    waiting: dict[str, Words] = {}
    active = np.ones(32, bool)
    statements = re.sub(r"//.*|^\s*\.reg.*", "", body, flags=re.M).replace(":\n", ":;")
    for line in statements.split(";"):
        text = line.strip()
        if text.endswith(":"):
            active = active | waiting.pop(text[:-1], np.zeros(32, bool))
            continue
        if not text:
            continue
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise NotImplementedError(text)
        negated, predicate, opcode, rest = found.groups()
        on = active
        if predicate is not None:
            on = active & (warp.values[predicate].astype(bool) ^ bool(negated))
        if opcode == "bra":
            waiting[rest] = waiting.get(rest, np.zeros(32, bool)) | on
            active = active & ~on
        elif opcode == "ret":
            break
        else:
            step(warp, opcode, _OPERAND.findall(rest), on)
    return warp.memory[OUT:].view(np.uint32)


def step(warp: Warp, opcode: str, operands: list[str], on: Words) -> None:
    name, *kinds = opcode.split(".")
    to, get = operands[0] if operands else "", warp.get
    wide = 64 if kinds and kinds[-1].endswith("64") else 32
    if name in ("ld", "st"):
        memory(warp, name, kinds, operands, on)
    elif name == "cp":
        copy(warp, kinds, operands)
    elif name == "bar":
        pass
    elif name == "mov" and operands[0].startswith("{"):
        low, high = names(operands[0])
        warp.put(low, get(operands[1]), on, 32)
        warp.put(high, get(operands[1]) >> np.uint64(32), on, 32)
    elif name == "mov" and operands[1].startswith("{"):
        low, high = (get(x) for x in names(operands[1]))
        warp.put(to, high << np.uint64(32) | low, on, 64)
    elif name in ("mov", "cvta", "cvt"):
        warp.put(to, get(operands[-1]), on, wide)
    elif name == "ldmatrix":
        rows = np.stack([warp.load(int(a), 4) for a in warp.address(operands[1])])
        elements = shorts(rows).reshape(4, 8, 8)
        if "trans" in kinds:
            elements = elements.transpose(0, 2, 1)
        for matrix, register in enumerate(names(to)):
            pair = elements[matrix, LANES // 4].reshape(32, 4, 2)[LANES, LANES % 4]
            warp.put(register, pair[:, 1] << np.uint64(16) | pair[:, 0], on, 32)
    elif name == "mma":
        a, b, c = (np.stack([get(x) for x in names(o)], 1) for o in operands[1:])
        product = matrix_product(a, b, c, kinds[-2])
        for i, register in enumerate(names(to)):
            warp.put(register, bits(product[:, i]), on, 32)
    elif name == "shfl":
        register = to.partition("|")[0]
        assert kinds[:2] == ["sync", "bfly"]
        lanes = int(get(operands[2])[0])
        warp.put(register, get(operands[1])[LANES ^ lanes], on, 32)
    else:
        arithmetic(warp, name, kinds, operands, on, wide)


def memory(warp: Warp, name: str, kinds: list[str], operands: list[str], on: Words) -> None:
    if kinds[0] == "param":
        warp.put(operands[0], np.full(32, OUT if "+8" in operands[1] else IN), on, 64)
        return
    registers = names(operands[0 if name == "ld" else 1])
    address = warp.address(operands[1 if name == "ld" else 0])
    assert kinds[-1] in ("u32", "f32", "b32")
    assert not (address % np.uint64(4 * len(registers))).any(), "unaligned"
    if name == "ld":
        read = np.stack([warp.load(int(a), len(registers)) for a in address], 1)
        for register, words in zip(registers, read):
            warp.put(register, words, on, 32)
        return
    written = np.stack([warp.get(register) for register in registers], 1)
    for lane in LANES[on]:
        warp.store(int(address[lane]), written[lane])


def copy(warp: Warp, kinds: list[str], operands: list[str]) -> None:
    if kinds[1] == "commit_group":
        warp.groups += 1
    elif kinds[1] == "wait_group":
        ready = warp.groups - int(operands[0])
        for group, to, source, size, read in [c for c in warp.copies if c[0] < ready]:
            warp.memory[to : to + size] = 0
            warp.memory[to : to + read] = warp.memory[source : source + read]
            warp.copies.remove((group, to, source, size, read))
    else:
        assert kinds == ["async", "cg", "shared", "global"]
        parts = (warp.address(operands[0]), warp.address(operands[1]), *map(warp.get, operands[2:]))
        warp.copies += [(warp.groups, *(int(p[lane]) for p in parts)) for lane in LANES]


def arithmetic(
    warp: Warp, name: str, kinds: list[str], operands: list[str], on: Words, wide: int
) -> None:
    to, *args = operands
    x = [warp.get(a) for a in args]
    f = [floats(v) for v in x] if kinds[-1] == "f32" else []
    shift = x[1] & np.uint64(63) if len(x) > 1 else None
    with np.errstate(all="ignore"):
        if name == "setp":
            compare = {"eq": np.equal, "lt": np.less}[kinds[0]]
            warp.put(to, compare(*(f or [signed(v) for v in x])), on, 1)
        elif name == "selp":
            warp.put(to, np.where(warp.values[args[2]].astype(bool), x[0], x[1]), on, wide)
        elif name == "mul" and kinds[0] == "wide":
            warp.put(to, (signed(x[0]) * signed(x[1])).view(np.uint64), on, 64)
        elif name == "mul" and kinds[0] == "hi":
            warp.put(to, (signed(x[0]) * signed(x[1]) >> 32).view(np.uint64), on, 32)
        elif name == "mul" and kinds[0] == "lo":
            warp.put(to, x[0] * x[1], on, wide)
        elif name == "shr" and kinds[0] == "s32":
            warp.put(to, (signed(x[0]) >> x[1].astype(np.int64)).view(np.uint64), on, 32)
        elif name == "bfi":
            at, size = int(x[2][0]), int(x[3][0])
            mask = np.uint64((2**size - 1) << at)
            warp.put(to, x[1] & ~mask | x[0] << x[2] & mask, on, wide)
        elif f:
            floating = {
                "add": lambda: f[0] + f[1], "sub": lambda: f[0] - f[1],
                "mul": lambda: f[0] * f[1], "div": lambda: f[0] / f[1], "neg": lambda: -f[0],
                "ex2": lambda: np.exp2(f[0]), "rsqrt": lambda: 1 / np.sqrt(f[0]),
            }  # fmt: skip
            warp.put(to, bits(floating[name]()), on, 32)
        else:
            whole = {
                "add": lambda: x[0] + x[1], "sub": lambda: x[0] - x[1],
                "xor": lambda: x[0] ^ x[1], "shl": lambda: x[0] << shift,
                "shr": lambda: x[0] >> shift,
            }  # fmt: skip
            if name not in whole:
                raise NotImplementedError(name)
            warp.put(to, whole[name](), on, wide)
