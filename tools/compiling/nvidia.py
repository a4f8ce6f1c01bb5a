"""A cubin read with the tools of the Triton package: resources and machine code (SASS)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.compiling.code import Code, Counts, Instruction, by_width, innermost, longest

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_LABEL = re.compile(r"\s*(\.L_\S+):")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?);")
_TARGET = re.compile(r"`\((\.L_[^)\s]+)\)")
# of the tensor cores: Ampere's and Ada's, Hopper's by warpgroups, Blackwell's two kinds
_TENSOR = re.compile(r"(?:H|I|D|Q|O)G?MMA|UTC\w*MMA|WGMMA")
_BULK = ("UTMALDG", "UBLKCP")
_SUB_WORD = {"U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _tool(name: str, cubin: Path, *flags: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *flags, cubin], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout


def resources(text: str) -> tuple[int, int]:
    """Registers of a thread and its bytes of local memory, from --dump-resource-usage."""
    found = _RESOURCES.search(text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def parse(text: str) -> Code:
    """The code that nvdisasm printed."""
    code = Code()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif found := _LINE.match(line):
            guarded, opcode, operands = found[1] is not None, found[2], found[3]
            code.instructions.append(_instruction(guarded, opcode, operands))
    return code


def _instruction(guarded: bool, opcode: str, operands: str) -> Instruction:
    name = opcode.partition(".")[0]
    if name in ("BRA", "JMP", "CALL"):
        target = _TARGET.search(operands)
        # a predicate may stand among the operands: BRA P1, `(.L_x_2)
        bare = target is not None and operands[: target.start()].strip() == ""
        falls = guarded or not bare or name == "CALL"
        # a call comes back, so for the order of instructions it is like any other
        return Instruction(opcode, target[1] if target and name != "CALL" else None, falls)
    return Instruction(opcode, None, guarded or name not in ("EXIT", "RET", "BRX", "JMX"))


def counted(instruction: Instruction) -> bool:
    return not instruction.opcode.startswith("NOP")


def width(opcode: str) -> int:
    """Bits that a global load or store moves for a thread."""
    parts = opcode.split(".")[1:]
    for part in parts:
        if part in _SUB_WORD:
            return _SUB_WORD[part]
    return next((int(part) for part in parts if part in ("64", "128", "256")), 32)


def _loads(instructions: Iterable[Instruction]) -> dict[str, int]:
    found: Counter[int] = Counter()
    bulk = 0
    for instruction in instructions:
        name = instruction.opcode.partition(".")[0]
        if name in ("LDG", "LDGSTS"):
            found[width(instruction.opcode)] += 1
        bulk += name in _BULK
    return {**by_width(found), **({"TMA": bulk} if bulk else {})}


def counts(registers: int, local: int, shared: int, code: Code) -> Counts:
    stores: Counter[int] = Counter()
    names: Counter[str] = Counter()
    tensor: Counter[str] = Counter()
    for instruction in code.instructions:
        name = instruction.opcode.partition(".")[0]
        names[name] += 1
        if name == "STG":
            stores[width(instruction.opcode)] += 1
        elif _TENSOR.fullmatch(name):
            tensor[name] += 1
    return Counts(
        registers=registers,
        local=local,
        spill_loads=names["LDL"],
        spill_stores=names["STL"],
        shared=shared,
        instructions=sum(map(counted, code.instructions)),
        loop=innermost(code, counted),
        loop_loads=_loads(longest(code)),
        loads=_loads(code.instructions),
        stores=by_width(stores),
        tensor=dict(sorted(tensor.items())),
    )


def read(kernel: Any) -> Counts:
    """What is counted of a kernel that Triton compiled for an NVIDIA GPU."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        registers, local = resources(_tool("cuobjdump", cubin, "--dump-resource-usage"))
        code = parse(_tool("nvdisasm", cubin, "-c"))
    return counts(registers, local, int(kernel.metadata.shared), code)
