"""How the CUDA library is built, found and chosen, on a machine that has no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvlm import builder, cuda
from fastvlm.cuda import choice, library
from fastvlm.ops import dispatch
from tools.compiling import cuda as compiling


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PyTorch that is a CUDA build, and a PATH whose nvcc only writes down how it was called."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("FASTVLM_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'for last; do :; done\ncase "$*" in *broken*) echo bad words >&2; exit 1;; esac\n'
        'echo compiled > "$last"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_why_it_cannot_be_built(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.missing() is None
    monkeypatch.setenv("PATH", "")
    assert library.missing() == "nvcc is not on the PATH"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.missing() == "this PyTorch is built without CUDA"
    monkeypatch.setenv("FASTVLM_CUDA", "0")
    assert library.missing() == "refused by FASTVLM_CUDA=0"
    with pytest.raises(library.BuildError, match="refused"):
        library.build(cuda_torch)


def test_every_source_is_compiled_and_linked(cuda_torch: Path) -> None:
    built = library.build(cuda_torch / "work")
    assert built.read_text() == "compiled\n"
    *compiled, linked = (cuda_torch / "calls").read_text().splitlines()
    sources = builder.source_dir()
    files = [*sources.glob("bind_cuda.cpp"), *sources.glob("bind_cuda/*.cpp")]
    files += sources.glob("cuda/*.cu")
    assert len(compiled) == len(files)
    for file in files:
        (call,) = (line for line in compiled if f"-c {file} " in line)
        assert call.split()[-1] in linked
        assert ("-gencode=arch=compute_80,code=sm_80" in call) == (file.suffix == ".cu")
    assert "-ltorch_cuda" in linked


def test_it_is_built_once(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE_DIR", str(cuda_torch / "cache"))
    assert library.build() == library.place()
    calls = (cuda_torch / "calls").read_text()
    library.build()
    assert (cuda_torch / "calls").read_text() == calls
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    library.build()
    assert (cuda_torch / "calls").read_text() != calls


def test_a_damaged_library_is_built_again(
    cuda_torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_CACHE_DIR", str(cuda_torch / "cache"))
    library.build().write_text("half")
    assert library.build().read_text() == "compiled\n"


def test_a_cache_that_cannot_be_written(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cuda_torch / "file").touch()
    monkeypatch.setenv("FASTVLM_CACHE_DIR", str(cuda_torch / "file"))
    with pytest.raises(builder.BuildError, match="cannot write to"):
        library.build()


def test_architectures_of_the_list(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    call = " ".join(next(c for c in library.commands(cuda_torch) if "norm.cu" in " ".join(c)))
    for code in ("86,code=sm_86", "90a,code=sm_90a", "120,code=sm_120", "120,code=compute_120"):
        assert f"-gencode=arch=compute_{code}" in call
    assert "sm_80" not in call


@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        ("7.0 7.5 8.0 8.6 9.0+PTX", ["sm_80", "sm_86", "sm_90", "compute_90"]),
        ("Turing;Ampere", ["sm_80", "sm_86", "compute_86"]),
        ("Hopper,9.0", ["sm_90", "compute_90"]),
        (library.ARCHITECTURES, ["sm_80", "compute_80", "sm_90a", "sm_100a"]),
    ],
)
def test_architectures_that_lists_have(listed: str, codes: list[str]) -> None:
    assert [option.rpartition("=")[2] for option in library._code(listed)] == codes


@pytest.mark.parametrize(
    ("listed", "words"),
    [("7.5", "8.0 or newer"), ("Volta", "8.0 or newer"), ("9.0;Hoper", "'Hoper' is no compute")],
)
def test_lists_that_name_nothing(listed: str, words: str) -> None:
    with pytest.raises(library.BuildError, match=f"TORCH_CUDA_ARCH_LIST={listed}.*{words}"):
        library._code(listed)


def test_what_is_built_is_what_is_counted() -> None:
    built = {option.rpartition("=")[2] for option in library._code(library.ARCHITECTURES)}
    assert set(compiling.ARCHS) == {code for code in built if code.startswith("sm_")}


def test_a_compiler_that_fails(cuda_torch: Path) -> None:
    with pytest.raises(library.BuildError, match="bad words"):
        library.build(cuda_torch / "broken")


def test_here_it_is_not_used() -> None:
    if torch.version.cuda is None:
        assert cuda.unavailable() == "this PyTorch is built without CUDA"
    else:
        assert torch.cuda.is_available() or cuda.unavailable() == "PyTorch sees no CUDA device"


def test_every_kernel_has_a_rule() -> None:
    served = {name for name, op in dispatch.OPS.items() if "cuda" in op.kernels}
    assert served == set(choice.RULES)


def test_rules() -> None:
    few, many = torch.empty(8, 16), torch.empty(choice.FEW_ROWS + 1, 16)
    assert choice.yields("rms_norm", (few,)) is None
    assert choice.yields("rms_norm", (many,)) == choice.RULES["rms_norm"].reason
    assert choice.yields("rms_norm_backward", (few,)) is not None
    assert choice.yields("linear_topk", (many,)) is None
