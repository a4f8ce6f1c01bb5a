"""PTX text as programs: instructions, labels, registers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)[^{;]*?\{\n(.*?)\n\}\n", re.S)
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_LABEL = re.compile(r"(\$\w+):\s*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")
# bits of a register, or of an element in memory
BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16,
        "bf16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "bf16x2": 32, "f16x2": 32,
        "b64": 64, "u64": 64, "s64": 64}  # fmt: skip


class PtxError(RuntimeError):
    """A fault of a kernel, or an instruction that is not known."""


@dataclass(frozen=True)
class Instruction:
    name: str
    kinds: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{'.'.join((self.name, *self.kinds))} {', '.join(self.operands)}".strip()


@dataclass
class Program:
    name: str
    parameter: str
    parameter_bytes: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiled: list[object] = []


def names(operand: str) -> list[str]:
    """The registers of {%a, %b}, or the one that stands alone."""
    return re.findall(r"[%\w]+", operand)


def _statements(body: str) -> Iterator[str]:
    """Statements and labels; braces at the beginning are scopes of inline assembly."""
    for line in re.sub(r"//.*", "", body).split(";"):
        text = line.lstrip("{} \t\n")
        while found := _LABEL.match(text):
            yield f"{found[1]}:"
            text = text[found.end() :].lstrip("{} \t\n")
        if text.strip():
            yield text.strip()


def _add(program: Program, text: str) -> None:
    if text.endswith(":"):
        program.labels[text[:-1]] = len(program.instructions)
        return
    if declared := _REGISTERS.fullmatch(text):
        kind, stem, count = declared.groups()
        program.registers.update((f"{stem}{i}", BITS[kind]) for i in range(int(count)))
        return
    found = _STATEMENT.fullmatch(text)
    if text.startswith(".pragma"):
        return
    if text.startswith(".") or found is None:
        raise PtxError(f"not known: {text}")
    negated, predicate, opcode, rest = found.groups()
    name, *kinds = opcode.split(".")
    operands = tuple(_OPERAND.findall(rest))
    program.instructions.append(Instruction(name, tuple(kinds), operands, predicate, bool(negated)))


def parse(text: str) -> list[Program]:
    """The kernels of a module. Shared memory is what their launches ask for."""
    if re.search(r"^\s*\.(local|shared|const)\b", text, flags=re.M):
        raise PtxError("memory that no launch asks for")
    found = []
    for name, parameters, body in _ENTRY.findall(text):
        ((parameter, size),) = re.findall(r"(\w+)\[(\d+)\]", parameters)
        program = Program(name, parameter, int(size))
        for statement in _statements(body):
            _add(program, statement)
        found.append(program)
    return found
