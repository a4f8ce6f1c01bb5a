"""What users install: the wheel carries what they run and what compiles itself, nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# 730 kB when this was written, 790 kB with six more families, 822 kB with Pix2Struct and what looks
# for functions that somebody exchanged; tools, demo and emulator were 60 kB
MOST_BYTES = 850_000
# what belongs to a checkout, and is imported by nothing in the wheel
OURS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
CHECKOUT = OURS - {"fastvlm", "csrc"}
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def _build(kind: str, tree: Path, to: Path, **settings: str) -> Path:
    """As pip does it, without torch: nothing is compiled."""
    to.mkdir(exist_ok=True)
    env = {**os.environ, "FASTVLM_CPU": "0", "FASTVLM_CUDA": "0", **settings}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(to)],
        cwd=tree, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of an sdist of a checkout, neither of which the next one needs."""
    work = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip(f"not a checkout of git: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            to = work / "tree" / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes((ROOT / name).read_bytes())
    sdist = _build("sdist", work / "tree", work / "dist")
    with tarfile.open(sdist) as archive:
        # Python has filters of archives since 3.10.12, 3.11.4 and 3.12; Debian 12's is 3.11.2
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(work, **filters)
    return _build("wheel", work / sdist.name.removesuffix(".tar.gz"), work / "dist")


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_it_carries_the_package_and_its_sources(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = _names(wheel)
    ours = {name for name in names if ".dist-info/" not in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastvlm").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    sources = {
        f"fastvlm/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*") if path.is_file()
    }
    assert "fastvlm/py.typed" in ours
    assert ours == package | sources
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_one_with_a_library_is_of_a_platform_and_of_every_python(
    wheel: Path, tmp_path: Path
) -> None:
    (tree,) = wheel.parent.parent.glob("fastvlm-*")
    told = {"FASTVLM_CPU": "1", "CXX": "no-such-compiler"}  # the tag is there before the library
    found = _build("wheel", tree, tmp_path / "dist", **told)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", found.name), found.name


def test_its_sources_are_those_that_a_build_reads(wheel: Path) -> None:
    """What the builders compile, and what that includes."""
    csrc = ROOT / "csrc"
    compiled = [
        *csrc.glob("bind_c*.cpp"), *csrc.glob("bind_c*/*.cpp"), *csrc.glob("cpu/*.cpp"),
        *csrc.glob("cuda/*.cu"),
    ]  # fmt: skip
    needed: set[Path] = set()
    todo = [path.resolve() for path in compiled]
    while todo:
        path = todo.pop()
        if path in needed:
            continue
        needed.add(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            found = [(at / name).resolve() for at in (path.parent, csrc) if (at / name).is_file()]
            assert found or name.startswith("emulator/"), f"{path.name} includes {name}"
            todo += found[:1]
    carried = {n.removeprefix("fastvlm/csrc/") for n in _names(wheel) if "/csrc/" in n}
    assert carried == {str(path.relative_to(csrc)) for path in needed}


def test_it_holds_no_tests_and_needs_nothing_of_a_checkout() -> None:
    for path in (ROOT / "fastvlm").rglob("*.py"):
        assert not re.match(r"(test_|conftest|emulator)", path.name), path
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                assert name.partition(".")[0] not in {*CHECKOUT, "pytest", "unittest"}, (path, name)


def test_it_is_small(wheel: Path) -> None:
    size = wheel.stat().st_size
    assert 100_000 < size < MOST_BYTES, f"{size} bytes: is all of it what users run?"


def test_what_is_installed_runs(wheel: Path, tmp_path: Path) -> None:
    """Outside of the checkout; what belongs to one says so."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import fastvlm, sys\n"
        "from fastvlm.__main__ import main\n"
        "print(fastvlm.__file__, *(main([c]) for c in ('bench', 'demo', 'compile')))\n"
        "import fastvlm.builder as b\n"
        "print(b.source_dir())\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    package = tmp_path / "fastvlm"
    assert done.stdout.split() == [str(package / "__init__.py"), *"222", str(package / "csrc")]
    assert done.stderr.count("is part of the source checkout") == 3
