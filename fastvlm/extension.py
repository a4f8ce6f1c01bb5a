"""The CPU extension: built ahead of time, or by itself at first use; loaded once.

Nothing here imports torch or builds anything at import, so that setup.py can use it and
``python -m fastvlm env`` runs when the extension is broken.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
import threading
import warnings
from pathlib import Path

from fastvlm import builder
from fastvlm.builder import BuildError

LIBRARY = "_C_cpu.so"

# one namespace and one set of flags for each instruction set
_X86 = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        *["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
        *["-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    ],
}


class ExtensionWarning(UserWarning):
    """The CPU extension cannot be used; the message says why."""


class _State:
    lock = threading.Lock()
    done = False
    loaded = False
    reason: str | None = None
    path: str | None = None


def load() -> bool:
    """Load the extension, building it first where that is needed; True if it can be used.

    Looks for a library built with the package, then for one in the cache, then compiles into the
    cache. Where that fails, or FASTVLM_CPU=0 is set, gives False, now and at each later call;
    a failure warns once (ExtensionWarning) with the reason. Never raises.
    """
    if _State.done:
        return _State.loaded
    with _State.lock:
        if not _State.done:
            try:
                _load()
            except Exception as error:
                # whatever breaks here, the reference still serves: say why, once
                _State.reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"fastvlm: the CPU extension cannot be used, the slower reference serves: "
                    f"{_State.reason}",
                    ExtensionWarning,
                    stacklevel=3,
                )
            _State.done = True
    return _State.loaded


def available() -> bool:
    """Whether torch.ops.fastvlm_cpu can be used; loads it first."""
    return load()


def reason() -> str | None:
    """Why the extension cannot be used; None when it can."""
    load()
    return _State.reason


def path() -> str | None:
    """The file that was loaded."""
    load()
    return _State.path


def capability() -> str | None:
    """The instruction set in use; None without the extension.

    "DEFAULT", "AVX2", "AVX512", "AVX512_BF16" where the CPU multiplies bfloat16 pairs besides, or
    "AMX" where it multiplies tiles of bfloat16 too.
    """
    if not load():
        return None
    import torch

    return str(torch.ops.fastvlm_cpu.capability())


def _load() -> None:
    if os.environ.get("FASTVLM_CPU") == "0":
        _State.reason = "refused by FASTVLM_CPU=0"
        return
    import torch

    library = Path(__file__).parent / LIBRARY
    if library.exists() and not _open(library):
        library = Path("")
    if not library.is_file():
        library = _cached()
        if not builder.is_intact(library, _key()):
            # what is missing is said instead of "compiling", not after it
            _compiler()
            builder.find_ninja()
            builder.open_lock(library.parent).close()
            print(
                f"fastvlm: compiling the CPU extension once, into {library.parent}", file=sys.stderr
            )
        library = build(library.parent)
        torch.ops.load_library(str(library))
    torch.ops.fastvlm_cpu.capability()  # raises where FASTVLM_CPU_CAPABILITY cannot be had
    _State.path, _State.loaded = str(library), True


def _open(library: Path) -> bool:
    """Load a library that came with the package; False where this torch cannot."""
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warnings.warn(
            f"fastvlm: {library} does not load ({error}); compiling another",
            ExtensionWarning,
            stacklevel=2,
        )
        return False
    return True


def build(target_dir: Path | str | None = None, verbose: bool = False) -> Path:
    """Compile the extension into target_dir (default: the cache) unless it is there; its path.

    Safe when several processes start at once: one compiles, the others wait and take the result.
    Raises BuildError.
    """
    library = _cached() if target_dir is None else Path(target_dir) / LIBRARY
    return builder.build_once(library, _key(), lambda work: _compile(work, verbose))


def _cached() -> Path:
    return builder.cache_dir() / _key() / LIBRARY


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _compiler() -> str:
    """The compiler's command line: CXX may hold a wrapper or options too."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        program, *options = shlex.split(name)
        if found := shutil.which(program):
            return shlex.join([found, *options])
    raise BuildError(f"no C++ compiler ({wanted or 'g++, c++ or clang++'} not found)")


def _flags() -> list[str]:
    return [
        *["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-fno-math-errno"],
        "-Wno-psabi",  # vector types are passed between inlined functions only
        "-ffp-contract=fast",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI as of torch 2.10
        *(["-DFASTVLM_X86"] if _is_x86() else []),
        *_more_flags(),
    ]


def _more_flags() -> list[str]:
    """FASTVLM_CXXFLAGS: the last word to compiler and linker (sanitizers, -g)."""
    return shlex.split(os.environ.get("FASTVLM_CXXFLAGS", ""))


def _key() -> str:
    """Names a build: sources, flags, machine, and torch's release (its headers are compiled in)."""
    import torch

    digest = hashlib.sha256()
    sources = builder.source_dir()
    for file in sorted([sources / "bind_cpu.cpp", *sources.glob("*cpu/*")]):
        digest.update(str(file.relative_to(sources)).encode())
        digest.update(file.read_bytes())
    digest.update(repr((_flags(), _X86, platform.machine(), torch.__version__)).encode())
    return f"cpu-torch{torch.__version__.split('+')[0]}-{digest.hexdigest()[:16]}"


def _compile(work: Path, verbose: bool) -> None:
    from torch.utils import cpp_extension

    sources = builder.source_dir()
    includes = [f"-isystem {shlex.quote(p)}" for p in cpp_extension.include_paths()]
    # no rpath: torch is loaded before the library, which may be installed elsewhere
    links = [f"-L{shlex.quote(p)}" for p in cpp_extension.library_paths()]
    links += _more_flags()
    lines = [
        f"cxx = {_compiler()}",
        f"flags = {' '.join([*_flags(), *includes])}",
        "rule compile\n  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        f"rule link\n  command = $cxx -shared $in -o $out {' '.join(links)} -ltorch_cpu -lc10",
    ]
    objects = []
    for file in [sources / "bind_cpu.cpp", *sorted((sources / "bind_cpu").glob("*.cpp"))]:
        objects.append(f"{file.parent.name}.{file.stem}.o")
        lines.append(f"build {objects[-1]}: compile {builder.ninja_path(file)}")
    for isa, flags in (_X86 if _is_x86() else {"DEFAULT": []}).items():
        for file in sorted((sources / "cpu").glob("*.cpp")):
            objects.append(f"{file.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {builder.ninja_path(file)}")
            lines.append(f"  isa = -DCPU_CAPABILITY={isa} -DCPU_CAPABILITY_{isa} {' '.join(flags)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    builder.run_ninja(work, lines, "the C++ compiler", verbose)
