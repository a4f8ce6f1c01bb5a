"""What this machine is and which backend each op will use on it: ``python -m fastvlm env``.

Every question is asked on its own and a failure is printed as the answer: this is what one runs
when something is broken, so nothing broken may stop it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import textwrap
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastvlm.tables import text_table

PACKAGES = ("fastvlm", "torch", "transformers", "triton", "flash-attn", "numpy")
# the instruction sets that a kernel of ours or of PyTorch can make use of
FEATURES = (
    "fma", "f16c", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip

_OPS_WIDTH = 60  # of a line of ops that are served alike


def _ask(question: Callable[[], Any]) -> Any:
    """The answer, or the failure in words."""
    try:
        return question()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _version(package: str) -> str:
    if package == "fastvlm":
        return str(importlib.import_module("fastvlm").__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{package: str(_ask(lambda p=package: _version(p))) for package in PACKAGES},  # type: ignore[misc]
    }


def _tested() -> str:
    module = importlib.import_module("fastvlm.compat.versions")
    return "\n".join(module.outside()) or "all of these versions"


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")


def cpu() -> dict[str, Any]:
    """Model, cores that this process may use, and the instruction sets that matter here."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "features": [name for name in FEATURES if name in flags],
    }


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "none found"
        return f"none ({built})"
    props = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    return (
        f"{props.name}, compute capability {props.major}.{props.minor}, "
        f"{props.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        + (f", {count} of them" if count > 1 else "")
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def machine() -> dict[str, Any]:
    """The machine as every results file records it; says nothing that names the host."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _ask(cpu),
        "gpu": _ask(_gpu),
        "threads": _ask(_threads),
    }


def load_average() -> float | None:
    """Processes that wanted a core over the last minute: more than the cores spoil a timing."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def stamp() -> dict[str, Any]:
    """What stands at the head of every results file."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def extension() -> list[tuple[str, str]]:
    """Whether the compiled kernels are loaded, from which file, for which CPU, or why not."""
    module = importlib.import_module("fastvlm.extension")
    if not module.available():
        return [("extension", f"not loaded: {module.reason()}")]
    return [
        ("extension", "loaded"),
        ("extension file", str(module.path())),
        ("extension capability", str(module.capability())),
    ]


def _library() -> str:
    importlib.import_module("fastvlm.ops")
    gemm = importlib.import_module("fastvlm.cpu.gemm")
    why = "measured" if gemm.VARIABLE not in os.environ else gemm.VARIABLE
    library = f"{gemm.library()} ({why})"
    return f"packed, few rows of a transposed weight {library}" if gemm.packs_float32() else library


def backends(device: str) -> str:
    """The backend that serves each op on this device type, and why not a better one."""
    status = importlib.import_module("fastvlm.ops.dispatch").status(device)
    alike: dict[tuple[str, str], list[str]] = {}
    for op, backend, why in status:
        # a compiler's whole complaint stands once, above; here its first line will do
        alike.setdefault((backend, why.partition("\n")[0].rstrip(":")), []).append(op)
    rows = []
    for served, ops in alike.items():
        for line in textwrap.wrap(", ".join(ops), _OPS_WIDTH, break_long_words=False):
            rows.append((line, *served))
            served = ("", "")
    return text_table(("ops", "backend", "why not a better one"), rows)


def describe() -> str:
    """All of it, as ``python -m fastvlm env`` prints it."""
    with warnings.catch_warnings():
        # whatever a part has to warn about is an answer below
        warnings.simplefilter("ignore")
        return _describe()


def _describe() -> str:
    processor = _ask(cpu)
    facts: list[tuple[str, str]] = list(versions().items())
    facts.append(("tested", str(_ask(_tested))))
    facts.append(("system", platform.platform()))
    if isinstance(processor, dict):
        facts.append(("cpu", f"{processor['model']}, {processor['cores']} usable cores"))
        facts.append(("cpu features", " ".join(processor["features"]) or "none known"))
    else:
        facts.append(("cpu", str(processor)))
    facts.append(("threads", str(_ask(_threads))))
    facts.append(("gpu", str(_ask(_gpu))))
    loaded = _ask(extension)
    facts.extend(loaded if isinstance(loaded, list) else [("extension", str(loaded))])
    facts.append(("large float32 products", str(_ask(_library))))
    width = max(len(name) for name, _ in facts)
    indent = "\n" + " " * (width + 2)
    lines = (f"{name.ljust(width)}  {indent.join(value.split(chr(10)))}" for name, value in facts)
    parts = ["\n".join(lines)]
    for device in ("cpu", "cuda"):
        table = str(_ask(lambda d=device: backends(d)))  # type: ignore[misc]
        parts.append(f"on {device}:\n" + "\n".join("  " + line for line in table.splitlines()))
    return "\n\n".join(parts)
