"""Building and loading the CPU extension, each case in a process and a cache of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvlm import builder, extension

ROOT = Path(__file__).parents[1]
SCRIPT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastvlm import extension
    first, second = extension.load(), extension.load()
names = [f"{w.category.__name__}: {w.message}" for w in caught]
mine = [n for n in names if n.startswith("ExtensionWarning")]
print(first, second, len(mine), extension.path(), "|", extension.reason(), "|", *mine)
"""


# how a library is built is tested here, not how fast it is
QUICKLY = "-O0"


@pytest.fixture(scope="module")
def quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CXXFLAGS", QUICKLY)
        yield


@pytest.fixture(scope="module")
def built(quickly: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to copy from, so that only the tests about building build."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    try:
        return extension.build(shared / "built")
    except extension.BuildError as error:
        pytest.skip(f"cannot build here: {error}")


@pytest.fixture(autouse=True)
def prebuilt_refused() -> None:
    if (Path(extension.__file__).parent / extension.LIBRARY).exists():
        pytest.skip("the package holds a library, so none is looked for in the cache")


def start(cache: Path, script: str = SCRIPT, **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTVLM_")}
    env |= {"FASTVLM_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    env |= {"FASTVLM_CXXFLAGS": QUICKLY, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def cached(cache: Path) -> Path:
    return cache / extension._key() / extension.LIBRARY


def put(built: Path, cache: Path) -> Path:
    library = cached(cache)
    shutil.copytree(built.parent, library.parent)
    return library


@pytest.mark.slow
@pytest.mark.turns(6)
def test_three_processes_mend_a_damaged_library_once(built: Path, tmp_path: Path) -> None:
    """A wrapper around the compiler counts the links: one library, loaded by all three."""
    log, wrapper = tmp_path / "links", tmp_path / "counting cxx"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo link >> "{log}";; esac\n'
        f'exec {extension._compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    cache = tmp_path / "a cache: with $igns"
    library = put(built, cache)
    library.write_bytes(library.read_bytes()[:1000])
    running = [start(cache, CXX=f"'{wrapper}'") for _ in range(3)]
    for process in running:
        out, err = finish(process)
        assert out.startswith(f"True True 0 {cached(cache)}"), out + err
        assert "compiling" in err or log.exists()
    assert log.read_text().splitlines() == ["link"]
    leftovers = [p for p in cached(cache).parent.iterdir() if p.name.startswith("build-")]
    assert not leftovers


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"CXX": "no-such-compiler"}, "no-such-compiler"), ({"PATH": "/nonexistent"}, "no C++")],
)
def test_no_compiler(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    environment = {"CXX": "", **environment}
    out, err = finish(start(tmp_path, **environment))
    assert out.startswith("False False 1 None"), out
    assert message in out
    assert "compiling" not in err
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where its folder would be: that stops root, too."""
    (tmp_path / "file").touch()
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    out, err = finish(start(tmp_path / "file" / "cache", CXX=str(compiler)))
    assert out.startswith("False False 1 None"), out
    assert "cannot write to" in out
    assert "FASTVLM_CACHE_DIR" in out
    assert "compiling" not in err


def test_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho the last line of a compiler\nexit 1\n")
    compiler.chmod(0o755)
    out, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert out.startswith("False False 1 None"), out
    assert "the last line of a compiler" in out


@pytest.mark.turns(3)
def test_cached_library_needs_no_compiler(built: Path, tmp_path: Path) -> None:
    library = put(built, tmp_path)
    out, err = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out.startswith(f"True True 0 {library} | None"), out
    assert "compiling" not in err


def test_damaged_library_without_a_compiler(built: Path, tmp_path: Path) -> None:
    put(built, tmp_path).write_bytes(b"not a library")
    out, _ = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out.startswith("False False 1 None"), out


def test_refused(built: Path, tmp_path: Path) -> None:
    put(built, tmp_path)
    out, err = finish(start(tmp_path, FASTVLM_CPU="0"))
    assert out.startswith("False False 0 None"), out
    assert "FASTVLM_CPU=0" in out
    assert "compiling" not in err


def test_unknown_capability(built: Path, tmp_path: Path) -> None:
    put(built, tmp_path)
    out, _ = finish(start(tmp_path, FASTVLM_CPU_CAPABILITY="avx9000"))
    assert out.startswith("False False 1 None"), out
    assert "AVX9000" in out


def test_capabilities_agree(built: Path, tmp_path: Path) -> None:
    put(built, tmp_path)
    script = """
import torch
from fastvlm import builder, extension
assert extension.load()
x, w, b = (torch.load({inputs!r})[k] for k in "xwb")
y = torch.ops.fastvlm_cpu.gelu_mlp(x, w, b, w.T.contiguous(), None, 0)
torch.save(y, {inputs!r} + "." + extension.capability())
print(extension.capability())
"""
    inputs = tmp_path / "inputs.pt"
    torch.save(
        {"x": torch.randn(5, 333), "w": torch.randn(111, 333) / 18, "b": torch.randn(111)}, inputs
    )
    results = {}
    for name in ("default", "avx2", "avx512"):
        process = start(tmp_path, script.format(inputs=str(inputs)), FASTVLM_CPU_CAPABILITY=name)
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            assert out.strip() == name.upper()
            results[name] = torch.load(f"{inputs}.{name.upper()}")
    assert "default" in results, err
    for name, result in results.items():
        torch.testing.assert_close(result, results["default"], msg=name)


def test_import_neither_builds_nor_imports_torch(tmp_path: Path) -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("by_path", {extension.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print([name for name in sys.modules if name.split(".")[0] == "torch"])
"""
    out, _ = finish(start(tmp_path, script))
    assert out.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_a_system_without_fcntl(built: Path, tmp_path: Path) -> None:
    """Windows has none: the library of the cache is loaded, and an op runs on it."""
    put(built, tmp_path)
    script = """
import sys
import types
sys.modules["fcntl"] = None
import torch
from fastvlm import extension, ops
x, w = torch.ones(2, 3), torch.zeros(3)
assert torch.allclose(ops.rms_norm(x, w), x)
print(extension.path(), extension.build())
"""
    out, _ = finish(start(tmp_path, script))
    assert out.split() == [str(cached(tmp_path))] * 2


def test_a_lock_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """msvcrt gives up after ten seconds with an OSError; the lock goes on waiting."""
    calls: list[int] = []

    def locking(descriptor: int, mode: int, size: int) -> None:
        calls.append(mode)
        if len(calls) == 1:
            raise OSError("deadlock avoided")

    windows = types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_UNLCK=0)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    with (tmp_path / ".lock").open("w") as file, builder.locked(file):
        assert calls == [1, 1]
    assert calls == [1, 1, 0]
