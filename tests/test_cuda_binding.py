"""The bindings of the CUDA kernels as they are compiled for a GPU: the emulator has others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_emulator
import pytest
from torch.utils import cpp_extension

from fastvlm import builder
from fastvlm.cuda import library

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
SOURCES = [builder.source_dir() / "bind_cuda.cpp"]
SOURCES += sorted((builder.source_dir() / "bind_cuda").glob("*.cpp"))


@needs_nvcc
@pytest.mark.cuda
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_binding_compiles_for_a_gpu(source: Path, tmp_path: Path) -> None:
    """Against the headers of any build of PyTorch; warnings are errors."""
    command = next(c for c in library.commands(tmp_path) if str(source) in c)
    # not optimized, which takes longer: what is compiled is thrown away
    command = [word for word in command if word != "-O3"]
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    command += [*includes, "-Xcompiler=-Wall,-Wextra,-Werror"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env=cuda_emulator.compilers_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which(cuda_emulator.CXX) is None, reason="no C++ compiler")
def test_slots_of_counters(tmp_path: Path) -> None:
    program = tmp_path / "slots"
    include = f"-I{builder.source_dir()}"
    source = str(HERE / "cuda" / "slots.cpp")
    subprocess.run(
        [cuda_emulator.CXX, "-std=c++17", "-pthread", include, source, "-o", str(program)],
        check=True, env=cuda_emulator.compilers_environment(),
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
