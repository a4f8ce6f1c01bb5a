"""The CUDA kernels without a GPU: compiled by g++ onto tests/cuda/emulator, on CPU tensors.

The same bindings and launchers as on a GPU call them. A fault that the emulator finds (an access
outside of what the launch was given, a race, threads that part at a barrier) is a RuntimeError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

import fastvlm
from fastvlm import builder
from fastvlm import cuda as backend

# where kernels and bindings find emulator/
HERE = Path(__file__).resolve().parent / "cuda"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
         "-Wno-unused-parameter", "-fno-strict-aliasing"]  # fmt: skip
# its calls are answered by tests/cuda/emulator/memory.cpp, not by the sanitizer's own library
WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
# instead, in a process that runs under these sanitizers: local arrays, shifts, overflows, which the
# emulator does not judge
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
SANITIZED = "FASTVLM_CUDA_SANITIZERS"
BINDING = ["-DFASTVLM_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SCHEDULES = ("round robin", "random", "priority")


def sources() -> Path:
    return builder.source_dir()


def missing() -> str | None:
    """Why there is no emulator here."""
    if shutil.which(CXX) is None:
        return f"no {CXX} to compile the CUDA kernels for the emulator"
    # the calls before each access to memory are GCC's
    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=False)
    if "clang" in version.stdout:
        return f"{CXX} is clang: the emulator answers the instrumentation of GCC"
    return None


def compilers_environment() -> dict[str, str]:
    """A sanitizer that this process runs under is not for a compiler: nvcc crashes with it."""
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


def _compile(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=compilers_environment()
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def sanitized() -> bool:
    return bool(os.environ.get(SANITIZED))


def compile_watched(source: Path, to: Path, engine: Path, *options: str) -> None:
    """A file of kernels as a library, every access to memory of which is judged."""
    kind = SANITIZERS if sanitized() else WATCHED
    _compile(
        [CXX, *FLAGS, f"-I{HERE}", *kind, *options, "-x", "c++", "-c", str(source), "-o", f"{to}.o"]
    )
    # without WATCHED: the sanitizer's own library must not be linked
    _compile([CXX, "-shared", f"{to}.o", str(engine), "-o", str(to)])


def floors() -> list[str]:
    return sorted(file.stem for file in (sources() / "cuda").glob("*.cu"))


def _key() -> str:
    how = FLAGS, SANITIZERS if sanitized() else WATCHED, BINDING, CXX, torch.__version__
    digest = hashlib.sha256(repr(how).encode())
    csrc = sources()
    kernels = [*csrc.glob("bind_cuda*"), *csrc.glob("*cuda/**/*")]
    for root, files in ((csrc, kernels), (HERE, (HERE / "emulator").glob("*"))):
        for file in sorted(filter(Path.is_file, files)):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    csrc, engine = sources(), folder / "libengine.so"
    parts = [str(file) for file in sorted((HERE / "emulator").glob("*.cpp"))]
    finds = [f"-I{csrc}", f"-I{HERE}"]
    _compile([CXX, *FLAGS, *finds, "-shared", *parts, "-o", str(engine), "-ldl"])
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    files = [csrc / "bind_cuda.cpp", *sorted((csrc / "bind_cuda").glob("*.cpp"))]
    objects = [folder / f"{file.parent.name}.{file.stem}.o" for file in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(
                _compile,
                [CXX, *FLAGS, *BINDING, f"-I{HERE}", *includes, "-c", str(file), "-o", str(to)],
            )
            for file, to in zip(files, objects)
        ]
        jobs += [
            pool.submit(
                compile_watched, csrc / "cuda" / f"{floor}.cu", folder / f"{floor}.so", engine
            )
            for floor in floors()
        ]
        for job in jobs:
            job.result()
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    _compile(
        [CXX, "-shared", *map(str, objects), str(engine), *paths, "-ltorch_cpu", "-lc10", "-o",
         str(folder / "binding.so")]
    )  # fmt: skip


@functools.cache
def folder() -> Path:
    """Where the compiled emulator lies; built once for these sources."""
    place = builder.cache_dir() / f"cuda-emulator-{_key()}"
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock, builder.locked(lock):
        if not (place / ".done").exists():
            _build(place)
            (place / ".done").touch()
    return place


@functools.cache
def machine() -> ctypes.CDLL:
    """The emulator in this process, without kernels and without ops.

    The only part that a process may load whose fastvlm_cuda is the library for a GPU: the ops of
    both have the same names.
    """
    loaded = ctypes.CDLL(str(folder() / "libengine.so"), mode=ctypes.RTLD_GLOBAL)
    loaded.emulator_load.restype = ctypes.c_void_p
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulator_unload.argtypes = [ctypes.c_void_p]
    loaded.emulator_settings.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.emulator_watch(not sanitized())
    return loaded


@functools.cache
def engine() -> ctypes.CDLL:
    """The emulator in this process, with every floor's kernels and the ops of fastvlm_cuda."""
    loaded = machine()
    for floor in floors():
        load(loaded, folder() / f"{floor}.so")
    torch.ops.load_library(str(folder() / "binding.so"))
    return loaded


def load(loaded: ctypes.CDLL, path: Path) -> int:
    handle = loaded.emulator_load(str(path).encode())
    assert handle, loaded.emulator_error()
    return int(handle)


@contextlib.contextmanager
def emulated(schedule: str = "round robin", seed: int = 1) -> Iterator[None]:
    """Inside, ``fastvlm.use("cuda")`` serves CPU tensors."""
    engine().emulator_settings(SCHEDULES.index(schedule), seed)
    with backend.on_cpu_tensors(), fastvlm.use("cuda"):
        yield


NAMES = ("launches", "blocks", "barriers", "collectives", "copies", "bank_conflicts")


def counts() -> dict[str, int]:
    """What has happened since reset_counts()."""
    values = (ctypes.c_int64 * len(NAMES))()
    engine().emulator_counts(values)
    return dict(zip(NAMES, values))


def largest_launch() -> tuple[int, int]:
    """The most threads and bytes of shared memory of a block since reset_counts()."""
    return engine().emulator_most_threads(), engine().emulator_largest_shared()


def reset_counts() -> None:
    engine().emulator_reset_counts()


@contextlib.contextmanager
def replaced(floor: str, file: str, old: str, new: str, to: Path) -> Iterator[None]:
    """Inside, the floor's kernels are those of a csrc in which one place of one file differs."""
    csrc = to / "csrc"
    shutil.copytree(sources() / "cuda", csrc / "cuda")
    changed = csrc / "cuda" / file
    text = changed.read_text()
    assert len(re.findall(re.escape(old), text)) == 1, f"{file} has changed: plant this bug anew"
    changed.write_text(text.replace(old, new))
    # -w: a bug may leave a variable without a use
    engine_file = folder() / "libengine.so"
    compile_watched(
        csrc / "cuda" / f"{floor}.cu", to / "mutant.so", engine_file, "-w", "-DFASTVLM_FEW"
    )
    handle = load(engine(), to / "mutant.so")
    try:
        yield
    finally:
        engine().emulator_unload(handle)
