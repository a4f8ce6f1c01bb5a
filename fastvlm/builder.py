"""How a library of kernels is compiled: once, whole, into the cache, by whoever comes first.

`fastvlm.extension` (CPU) and `fastvlm.cuda.library` say what is compiled; here is how. Imports
nothing of torch, so that setup.py can use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

STAMP = ".stamp"  # beside a library: what it was built from, and its digest


class BuildError(RuntimeError):
    """A library does not build: no compiler, no ninja, or the compiler's last lines."""


def cache_dir() -> Path:
    """FASTVLM_CACHE_DIR, else XDG_CACHE_HOME/fastvlm, else ~/.cache/fastvlm."""
    if directory := os.environ.get("FASTVLM_CACHE_DIR"):
        return Path(directory)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastvlm"


def source_dir() -> Path:
    """csrc, beside the package in a checkout or inside it when installed. Raises BuildError."""
    package = Path(__file__).resolve().parent
    for directory in (package / "csrc", package.parent / "csrc"):
        if (directory / "bind_cpu.cpp").exists():
            return directory
    raise BuildError(f"the sources (csrc) are neither in {package} nor beside it")


def build_once(library: Path, key: str, compile_into: Callable[[Path], None]) -> Path:
    """Compile a library unless it is there as key names it; its path.

    compile_into(folder) leaves a file of the library's name in a folder beside its place. Safe
    when several processes start at once: one compiles, the others wait and take the result.
    Raises BuildError.
    """
    target = library.parent
    with open_lock(target) as lock, locked(lock):
        if is_intact(library, key):
            return library
        with tempfile.TemporaryDirectory(dir=target, prefix="build-") as work:
            compile_into(Path(work))
            # whole or not at all: loading half a library kills Python
            os.replace(Path(work) / library.name, library)
        (target / STAMP).write_text(_stamp(library, key))
    return library


def open_lock(target: Path) -> IO[str]:
    """The file of a cache's folder that is locked; both are made. Raises BuildError."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        return (target / ".lock").open("w")
    except OSError as error:
        raise BuildError(
            f"cannot write to {target}: {error} (FASTVLM_CACHE_DIR names another folder)"
        ) from error


def _stamp(library: Path, key: str) -> str:
    return f"{key} {hashlib.sha256(library.read_bytes()).hexdigest()}"


def is_intact(library: Path, key: str) -> bool:
    """Whether this is what the sources gave, to the last byte."""
    stamp = library.parent / STAMP
    return library.exists() and stamp.exists() and stamp.read_text() == _stamp(library, key)


@contextlib.contextmanager
def locked(file: Any) -> Iterator[None]:
    """Hold an open file for this process alone; others wait."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        with _locked_on_windows(file):
            yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file lets go


@contextlib.contextmanager
def _locked_on_windows(file: Any) -> Iterator[None]:
    try:
        msvcrt = importlib.import_module("msvcrt")
    except ImportError:
        yield  # neither: two processes compile twice, and the last replaces the other's whole file
        return
    held = False
    while not held:
        with contextlib.suppress(OSError):  # it waits ten seconds, and then raises
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            held = True
    try:
        yield
    finally:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def find_ninja() -> str:
    """ninja's path: of the package of that name, or of the system. Raises BuildError."""
    with contextlib.suppress(ImportError):
        import ninja

        candidate = Path(ninja.BIN_DIR) / "ninja"
        if candidate.exists():
            return str(candidate)
    if found := shutil.which("ninja"):
        return found
    raise BuildError("no ninja (pip install ninja)")


def ninja_path(path: Path | str) -> str:
    """A path as a build line of ninja wants it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_command(words: list[str]) -> str:
    """A command line as a rule of ninja wants it."""
    return shlex.join(words).replace("$", "$$")


def run_ninja(work: Path, lines: list[str], what: str, verbose: bool = False) -> None:
    """Build what lines say, in work, on all cores. what: who failed, in words.

    Raises BuildError with the compiler's last lines.
    """
    (work / "build.ninja").write_text("\n".join([*lines, ""]))
    done = subprocess.run(
        [find_ninja(), *(["-v"] if verbose else [])],
        cwd=work,
        stdout=None if verbose else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout or "").splitlines()[-15:])
        raise BuildError(f"{what} failed:\n{tail}")
