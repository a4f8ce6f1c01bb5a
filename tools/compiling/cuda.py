"""Proof that the CUDA kernels compile: ``python -m fastvlm compile --cuda``, without a GPU.

Every file csrc/cuda/*.cu is compiled by nvcc for each architecture. Of every kernel registers,
spills, shared memory, blocks that a multiprocessor holds and instructions are counted, judged and
compared with counts that were kept.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastvlm import builder
from fastvlm.tables import text_table
from tools.compiling import nvidia
from tools.compiling.architectures import ARCHITECTURES
from tools.compiling.code import Code

ARCHS = ("sm_80", "sm_90a", "sm_100a")
Row = dict[str, Any]

# threads and bytes of shared memory that a launch asks for, by head dimension
ATTENTION = {64: (128, 34816), 96: (128, 52224), 128: (128, 69632), 256: (64, 73728)}
# instructions whose number says how a kernel does its work
COUNTED = {
    "HMMA": re.compile(r"HMMA\b"),
    "LDSM": re.compile(r"LDSM\.16\.M88"),
    "LDSM.T": re.compile(r"LDSM\.16\.MT88"),
    "LDGSTS.128": re.compile(r"LDGSTS\b.*\.128"),
    "LDG.128": re.compile(r"LDG\b.*\.128"),
    "STG.128": re.compile(r"STG\b.*\.128"),
    "BAR": re.compile(r"BAR\b"),
    "SHFL": re.compile(r"SHFL\b"),
    "MUFU": re.compile(r"MUFU\b"),
}


class CompileError(RuntimeError):
    """Nothing was compiled, or the compiler's words."""


def launch_of(kernel: str) -> tuple[int, int]:
    """Threads and bytes of shared memory of a kernel's largest launch.

    As the launch functions in csrc compute them; the tests compare both.
    """
    numbers = [int(n) for n in re.findall(r"\b(\d+)\b", kernel.partition("<")[2])]
    if kernel.startswith("attention_kernel"):
        return ATTENTION[numbers[0]]
    if kernel.startswith("few_rows_linear"):
        return 256, numbers[-1] * 4096
    if kernel.startswith("topk_tiles"):
        return 256, numbers[-1] * 16 * (8 * 64 + 4 * (2 + 65))  # of 64 ranks
    if kernel.startswith("topk_merge"):
        return 256, 128 + 2 * 8192  # of as many blocks as there are tiles in the largest vocabulary
    if "norm" in kernel:
        return (256 if numbers[-1] == 8 else 384), 384
    raise CompileError(f"what does a launch of {kernel} ask for? launch_of does not know")


def readable(names: Sequence[str]) -> list[str]:
    """Demangled, without what is the same everywhere."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = []
    for line in done.stdout.splitlines():
        line = line.removeprefix("void ").replace("fastvlm::cuda::", "").partition("(")[0]
        for long, word in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("signed char", "int8")):
            line = line.replace(long, word)
        short.append(line)
    return short


def _nvcc(file: Path, arch: str, to: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", str(file), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{file.name} for {arch}:\n{done.stderr.strip()}")


def _resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of local memory of each function."""
    text = nvidia._tool("cuobjdump", cubin, "--dump-resource-usage")
    parts = re.split(r"^ Function (\S+):$", text, flags=re.M)[1:]
    return {name: nvidia.resources(words) for name, words in zip(parts[::2], parts[1::2])}


def _codes(cubin: Path) -> dict[str, Code]:
    text = nvidia._tool("nvdisasm", cubin, "-c")
    parts = re.split(r"^//-+ \.text\.(\S+)\s+-+$", text, flags=re.M)[1:]
    return {name: nvidia.parse(words) for name, words in zip(parts[::2], parts[1::2])}


def _row(file: str, arch: str, name: str, registers: int, local: int, code: Code) -> Row:
    opcodes = [instruction.opcode for instruction in code.instructions]
    counts = {word: sum(bool(form.match(o)) for o in opcodes) for word, form in COUNTED.items()}
    heads = Counter(opcode.partition(".")[0] for opcode in opcodes)
    threads, shared = launch_of(name)
    blocks, limit = ARCHITECTURES[arch.rstrip("a")].occupancy(registers, shared, threads // 32)
    return {
        "kernel": name,
        "arch": arch,
        "file": file,
        "registers": registers,
        "local": local,
        "spill_loads": heads["LDL"],
        "spill_stores": heads["STL"],
        "threads": threads,
        "shared": shared,
        "blocks": blocks,
        "limit": limit,
        "instructions": sum(map(nvidia.counted, code.instructions)),
        "counts": {word: n for word, n in counts.items() if n},
    }


def compile_one(file: Path, arch: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        _nvcc(file, arch, cubin)
        resources, codes = _resources(cubin), _codes(cubin)
    if set(resources) != set(codes) or not codes:
        raise CompileError(f"{file.name} for {arch}: the tools name other kernels")
    names = sorted(codes)
    return [
        _row(file.name, arch, short, *resources[name], codes[name])
        for name, short in zip(names, readable(names))
    ]


def compile_all(archs: Sequence[str], only: Sequence[str]) -> list[Row]:
    files = sorted((builder.source_dir() / "cuda").glob("*.cu"))
    jobs = [(file, arch) for file in files for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        rows = [row for part in pool.map(lambda job: compile_one(*job), jobs) for row in part]
    rows = [row for row in rows if not only or any(word in row["kernel"] for word in only)]
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def compiler() -> str:
    """The release of nvcc; its counts are another release's no more."""
    if shutil.which("nvcc") is None:
        raise CompileError("nvcc is not on the PATH")
    words = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", words)
    if found is None:
        raise CompileError(f"no version in what nvcc says: {words!r}")
    return found[1]


def wrong(rows: Iterable[Row]) -> list[str]:
    """What must not be, whatever was kept."""
    found = []
    for row in rows:
        title = f"{row['kernel']}  {row['arch']}"
        if row["local"] or row["spill_loads"] or row["spill_stores"]:
            found.append(
                f"{title}: {row['local']} bytes of local memory, {row['spill_loads']} loads and "
                f"{row['spill_stores']} stores of it"
            )
        if row["blocks"] < 1:
            found.append(f"{title}: does not fit ({row['limit']})")
        tensor = row["kernel"].startswith(("attention_kernel", "few_rows", "topk_tiles"))
        if tensor and not row["counts"].get("HMMA"):
            found.append(f"{title}: no instruction of the tensor cores")
        if row["kernel"].startswith("attention_kernel"):
            found += [
                f"{title}: no {word}"
                for word in ("LDSM", "LDSM.T", "LDGSTS.128")
                if not row["counts"].get(word)
            ]
    return found


def text(rows: Iterable[Row]) -> str:
    headers = (
        "kernel", "arch", "regs", "local", "LDL/STL", "threads", "shared", "blocks", "limited by",
        "instructions", "counts",
    )  # fmt: skip
    return text_table(headers, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    spills = f"{row['spill_loads']}/{row['spill_stores']}"
    counts = " ".join(f"{word}:{n}" for word, n in row["counts"].items())
    numbers = (row["registers"], row["local"], spills, row["threads"], row["shared"], row["blocks"])
    return (
        row["kernel"], row["arch"], *map(str, numbers), row["limit"], str(row["instructions"]),
        counts,
    )  # fmt: skip


def run(only: Sequence[str], out: Path | None, check: Path | None) -> int:
    """0: all compile, none spills, none has changed. 1: not so. 2: nothing was done."""
    from tools.compiling import cuda_kept as kept

    try:
        version = compiler()
        before = None if check is None else kept.load(check, version)
        rows = compile_all(ARCHS, only)
    except (CompileError, kept.KeptError) as error:
        print(f"fastvlm compile --cuda: {error}", file=sys.stderr)
        return 1 if isinstance(error, CompileError) and ".cu for " in str(error) else 2
    print(text(rows))
    faults = wrong(rows)
    changes = [] if before is None else kept.differences(before, rows, only)
    for title, lines in (("wrong", faults), ("changed", changes)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(lines))
    if out is not None:
        kept.save(out, version, rows)
    print(f"\nnvcc {version}: {len(rows)} compiled, {len(faults)} wrong, {len(changes)} changed")
    return 1 if faults or changes else 0
