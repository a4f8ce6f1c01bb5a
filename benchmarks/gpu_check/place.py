"""Where a run on a machine as it comes writes: the folder it is given, and a cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fastvlm import builder

ROOT = Path(__file__).resolve().parent.parent.parent


def cache(out: Path) -> Path:
    """fastvlm's cache, where it can be written; else a folder of out."""
    folder = builder.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except OSError:
        return (out / "cache").resolve()


def environment(out: Path) -> dict[str, str]:
    """Of every part: what compilers and libraries keep goes into the cache, and nothing is
    fetched. The cache outlives a run, so that the timings find what correctness has compiled."""
    kept = cache(out)
    folders = {
        "FASTVLM_CACHE_DIR": kept,
        "TRITON_CACHE_DIR": kept / "triton",
        "TORCHINDUCTOR_CACHE_DIR": kept / "inductor",
        "TORCH_EXTENSIONS_DIR": kept / "extensions",
        "CUDA_CACHE_PATH": kept / "cuda",
        "HF_HOME": kept / "huggingface",
        "XDG_CACHE_HOME": kept / "other",
        "MPLCONFIGDIR": kept / "matplotlib",
        "TMPDIR": kept / "tmp",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **{name: str(folder) for name, folder in folders.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        # no op of these runs is the CPU extension's: a minute of compiling for nothing
        "FASTVLM_CPU": os.environ.get("FASTVLM_CPU", "0"),
    }
