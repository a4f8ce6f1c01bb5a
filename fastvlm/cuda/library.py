"""The compiled CUDA kernels: how the library is built, and loaded once.

Like fastvlm/extension.py it imports no other part of fastvlm, so that setup.py can use it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = "_C_cuda.so"
VARIABLE = "TORCH_CUDA_ARCH_LIST"
# compute capabilities that the kernels are compiled for, unless TORCH_CUDA_ARCH_LIST says others:
# A100, Hopper and Blackwell data centre GPUs; PTX of the first for all that come after it
ARCHITECTURES = "8.0+PTX;9.0a;10.0a"
OLDEST_CAPABILITY = (8, 0)
# names that PyTorch knows in such a list; "" for what is older than ours
_NAMES = {
    **dict.fromkeys(("Kepler", "Maxwell", "Pascal", "Volta", "Turing"), ""),
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}  # fmt: skip
_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


class CudaBuildError(RuntimeError):
    """The CUDA library does not build: no nvcc, no CUDA in PyTorch, or the compiler's words."""


def refused() -> str | None:
    """Why the library is not to be built or used here; None where it may be."""
    if os.environ.get("FASTVLM_CUDA") == "0":
        return "refused by FASTVLM_CUDA=0"
    import torch

    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return None


def missing() -> str | None:
    """Why the library cannot be built here."""
    if why := refused():
        return why
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


def source_dir() -> Path:
    """csrc, beside the package in a checkout or inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "csrc", package.parent / "csrc"):
        if (directory / "bind_cuda.cpp").exists():
            return directory
    raise CudaBuildError(f"the sources (csrc) are neither in {package} nor beside it")


def _code(architectures: str) -> list[str]:
    """nvcc's options for a list such as "8.0;9.0a;10.0+PTX" or "Ampere;Hopper".

    What is older than our kernels is left out: such lists are often those of PyTorch itself.
    """
    wanted = architectures.replace(" ", ";").replace(",", ";").split(";")
    entries = [entry for word in wanted for entry in _NAMES.get(word, word).split(";") if entry]
    options: list[str] = []
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise CudaBuildError(
                f"{VARIABLE}={architectures}: {entry!r} is no compute capability such as 8.0, 9.0a "
                f"or 10.0+PTX, and none of {', '.join(_NAMES)}"
            )
        major, minor, kind, also = found.groups()
        if (int(major), int(minor)) < OLDEST_CAPABILITY:
            continue
        number = f"{major}{minor}{kind}"
        for code in ("sm", "compute") if also else ("sm",):
            option = f"-gencode=arch=compute_{number},code={code}_{number}"
            options += [] if option in options else [option]
    if not options:
        raise CudaBuildError(
            f"{VARIABLE}={architectures}: nothing in it is of compute capability 8.0 or newer"
        )
    return options


def commands(work: Path) -> list[list[str]]:
    """What compiles the library into work: each command stands alone, the last one links."""
    from torch.utils import cpp_extension

    sources, defines = source_dir(), ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    # torch's alone: nvcc knows its own
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    common = ["-std=c++17", "-O3", *defines, *includes]
    code = _code(os.environ.get(VARIABLE) or ARCHITECTURES)
    nvcc, objects, steps = shutil.which("nvcc") or "nvcc", [], []
    bindings = [sources / "bind_cuda.cpp", *sorted((sources / "bind_cuda").glob("*.cpp"))]
    for file in [*bindings, *sorted((sources / "cuda").glob("*.cu"))]:
        objects.append(str(work / f"{file.parent.name}.{file.stem}.o"))
        own = code if file.suffix == ".cu" else []
        steps.append(
            [nvcc, *common, *own, "-Xcompiler=-fPIC,-fvisibility=hidden", "-c", str(file), "-o",
             objects[-1]]
        )  # fmt: skip
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = ["-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    steps.append([nvcc, "-shared", *objects, *paths, *libraries, "-o", str(work / LIBRARY)])
    return steps


def build(target: Path) -> Path:
    """Compile the library into target; its path. Raises CudaBuildError."""
    if why := missing():
        raise CudaBuildError(why)
    target.mkdir(parents=True, exist_ok=True)
    for command in commands(target):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise CudaBuildError(f"nvcc failed:\n{tail}")
    return target / LIBRARY


def place() -> Path:
    """Where the package looks for the library."""
    return Path(__file__).resolve().parent.parent / LIBRARY


def _key() -> str:
    """Names a build: its sources and how they are compiled."""
    import torch

    digest = hashlib.sha256(repr((commands(Path()), torch.__version__)).encode())
    sources = source_dir()
    for file in sorted([sources / "bind_cuda.cpp", *sources.glob("*cuda/*.*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build_in_place() -> Path:
    """Compile the library to where the package looks for it, unless it is there already."""
    stamp = place().with_suffix(".stamp")
    if why := missing():
        raise CudaBuildError(why)
    if place().exists() and stamp.exists() and stamp.read_text() == _key():
        return place()
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        # whole or not at all: loading half a library kills Python
        whole = place().with_suffix(f".{os.getpid()}")
        shutil.copy2(built, whole)
        whole.replace(place())
    stamp.write_text(_key())
    return place()


@functools.cache
def reason() -> str | None:
    """Load the library that came with the package; why it cannot be used, None when it can."""
    if why := refused():
        return why
    import torch

    path = place()
    if not path.exists():
        return f"the CUDA kernels are not compiled ({sys.executable} -m fastvlm build)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


@functools.cache
def unsupported_device(index: int) -> str | None:
    import torch

    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))} (8.0 or newer is needed)"
    return None
