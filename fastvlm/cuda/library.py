"""The compiled CUDA kernels: what the library is built from, where it lies, and loaded once.

Like fastvlm/extension.py it imports nothing of torch before it is asked, so that setup.py can use
it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from fastvlm import builder
from fastvlm.builder import BuildError

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
            raise BuildError(
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
        raise BuildError(
            f"{VARIABLE}={architectures}: nothing in it is of compute capability 8.0 or newer"
        )
    return options


def commands(work: Path) -> list[list[str]]:
    """What compiles the library into work: each command stands alone, the last one links."""
    from torch.utils import cpp_extension

    sources, defines = (
        builder.source_dir(),
        ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"],
    )
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


def build(target: Path | None = None) -> Path:
    """Compile the library into target (default: the cache) unless it is there; its path.

    Raises BuildError.
    """
    if why := missing():
        raise BuildError(why)
    return builder.build_once(_cached() if target is None else target / LIBRARY, _key(), _compile)


def _compile(work: Path) -> None:
    *compiled, linked = commands(work)
    lines: list[str] = []
    objects: list[str] = []
    for number, command in enumerate([*compiled, linked]):
        out = builder.ninja_path(command[-1])
        lines.append(f"rule step{number}\n  command = {builder.ninja_command(command)}")
        lines.append(f"build {out}: step{number} {' '.join(objects) if command is linked else ''}")
        objects.append(out)
    builder.run_ninja(work, lines, "nvcc")


def _cached() -> Path:
    return builder.cache_dir() / f"cuda-{_key()[:16]}" / LIBRARY


def _packaged() -> Path:
    """Where a wheel that was built with nvcc carries the library."""
    return Path(__file__).resolve().parent.parent / LIBRARY


def place() -> Path:
    """The library that is loaded here: the one that came with the package, or the cache's."""
    return _packaged() if _packaged().exists() else _cached()


def _key() -> str:
    """Names a build: its sources and how they are compiled."""
    import torch

    digest = hashlib.sha256(repr((commands(Path()), torch.__version__)).encode())
    sources = builder.source_dir()
    for file in sorted([sources / "bind_cuda.cpp", *sources.glob("*cuda/*.*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def reason() -> str | None:
    """Load the library; why it cannot be used, None when it can."""
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
