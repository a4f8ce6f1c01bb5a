"""A kernel for AMD: the assembly text that Triton keeps, whose notes name the resources."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tools.compiling.code import Code, Counts, Instruction, by_width, innermost, longest

_LABEL = re.compile(r"(\.LBB\w+):")
_LINE = re.compile(r"\s+([a-z][a-z0-9_]+)\b([^;]*)")
_TARGET = re.compile(r"(\.LBB\w+)")
_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_SPILL = re.compile(r"scratch_(load|store)_")
_TENSOR = re.compile(r"v_s?mfmac?_\w+")
_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def parse(text: str) -> Code:
    code = Code()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := _LINE.match(line):
            code.instructions.append(_instruction(found[1], found[2]))
        elif line.lstrip().startswith(".section"):
            break  # what follows the code is notes
    return code


def _instruction(opcode: str, operands: str) -> Instruction:
    target = _TARGET.search(operands)
    if opcode.startswith(("s_branch", "s_cbranch")) and target:
        return Instruction(opcode, target[1], opcode != "s_branch")
    return Instruction(opcode, None, not opcode.startswith(("s_endpgm", "s_setpc")))


def note(text: str, name: str) -> int:
    """A number of the notes, .vgpr_count and the like; the notes name each once."""
    found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no .{name} in the notes of the kernel")
    return int(found[1])


def width(kind: str) -> int:
    """Bits of global_load_KIND: dwordx4, ushort, short_d16_hi and so on."""
    if kind in _BITS:
        return _BITS[kind]
    return 8 if "byte" in kind else 16


def _counted(instruction: Instruction) -> bool:
    return instruction.opcode not in ("s_nop", "s_code_end")


def _moved(instructions: Iterable[Instruction], what: str) -> dict[str, int]:
    found: Counter[int] = Counter()
    for instruction in instructions:
        access = _ACCESS.fullmatch(instruction.opcode)
        if access and access[1] == what:
            found[width(access[2])] += 1
    return by_width(found)


def counts(text: str, shared: int) -> Counts:
    code = parse(text)
    spills: Counter[str] = Counter()
    tensor: Counter[str] = Counter()
    for instruction in code.instructions:
        if found := _SPILL.match(instruction.opcode):
            spills[found[1]] += 1
        elif _TENSOR.fullmatch(instruction.opcode):
            tensor["MFMA"] += 1
    # vector registers that the compiler keeps elsewhere, whether or not it names an instruction
    spilled = note(text, "vgpr_spill_count")
    return Counts(
        registers=note(text, "vgpr_count"),
        local=note(text, "private_segment_fixed_size"),
        spill_loads=max(spills["load"], spilled),
        spill_stores=max(spills["store"], spilled),
        shared=shared,
        instructions=sum(map(_counted, code.instructions)),
        loop=innermost(code, _counted),
        loop_loads=_moved(longest(code), "load"),
        loads=_moved(code.instructions, "load"),
        stores=_moved(code.instructions, "store"),
        tensor=dict(tensor),
    )


def read(kernel: Any) -> Counts:
    """What is counted of a kernel that Triton compiled for an AMD GPU."""
    return counts(kernel.asm["amdgcn"], int(kernel.metadata.shared))
