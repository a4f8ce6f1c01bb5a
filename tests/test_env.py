"""`python -m fastvlm env` and `build`: they answer, whatever is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastvlm import env, extension
from fastvlm.__main__ import main
from fastvlm.tables import markdown_table, text_table

ROOT = Path(__file__).parents[1]
CACHES = ("XDG_CACHE_HOME", "FASTVLM_CACHE_DIR", "FASTVLM_CPU")


def _stub(**functions: object) -> types.ModuleType:
    module = types.ModuleType("fastvlm.extension")
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _raise(*_: object) -> None:
    raise RuntimeError("no compiler\nhere")


def test_env_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "cpu features", "threads", "gpu", "extension", "on cpu:"):
        assert word in out
    assert "cross_attention" in out
    assert "reference" in out


def test_env_in_a_process_without_extension_or_optional_packages() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('transformers', 'tabulate', 'matplotlib', 'PIL')))\n"
        "from fastvlm.__main__ import main\n"
        "sys.exit(main(['env']))\n"
    )
    environment = {**os.environ, "FASTVLM_CPU": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not loaded: refused by FASTVLM_CPU=0" in done.stdout


@pytest.mark.parametrize(
    "broken", ["raise OSError('libcudart.so.13: cannot open')", "import nowhere"]
)
def test_env_with_a_torch_that_does_not_import(broken: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm", "env"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "libcudart.so.13" in done.stdout or "No module named 'nowhere'" in done.stdout
    assert not done.stderr


@pytest.mark.turns(3)
def test_env_in_a_home_that_cannot_be_written() -> None:
    """No kernel can be compiled there: the answer says so, and that plain PyTorch serves."""
    if (ROOT / "fastvlm" / extension.LIBRARY).exists():
        pytest.skip("the package holds a library, so none is looked for in the cache")
    environment = {k: v for k, v in os.environ.items() if k not in CACHES}
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm", "env"], capture_output=True, text=True, cwd=ROOT,
        env={**environment, "HOME": "/proc"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not loaded: BuildError: cannot write to /proc/.cache/fastvlm" in done.stdout
    assert re.search(r"cross_attention,.* +reference +cpu: BuildError: cannot write", done.stdout)
    assert "FASTVLM_CACHE_DIR names another folder" in done.stdout
    assert "Traceback" not in done.stderr


def test_exit_codes_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit codes: 0 done; 1 done" in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from fastvlm.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    for command in ("demo", "caption", "bench", "env", "build"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"usage: fastvlm {command}" in done.stdout


def test_env_with_an_extension_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastvlm.extension", _stub(available=_raise))
    text = env.describe()
    assert "failed: RuntimeError: no compiler" in text
    assert "cross_attention" in text


def test_env_with_a_loaded_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _stub(available=lambda: True, path=lambda: "/x/lib.so", capability=lambda: "AVX2")
    monkeypatch.setitem(sys.modules, "fastvlm.extension", stub)
    assert env.extension() == [
        ("extension", "loaded"),
        ("extension file", "/x/lib.so"),
        ("extension capability", "AVX2"),
    ]


def test_env_without_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastvlm.ops.dispatch", None)
    text = env.describe()
    assert "on cpu:\n  failed: ModuleNotFoundError" in text


def test_a_reason_of_many_lines_keeps_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("dispatch")
    stub.status = lambda device: [("rope", "reference", "cpu: failed:\nline\nline")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastvlm.ops.dispatch", stub)
    assert env.backends("cpu").splitlines()[-1].split() == ["rope", "reference", "cpu:", "failed"]


def test_a_reason_that_many_ops_have_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"op_number_{i}" for i in range(20)]
    stub = types.ModuleType("dispatch")
    stub.status = lambda device: [  # type: ignore[attr-defined]
        *[(name, "reference", "cpu: no compiler") for name in names], ("rope", "cpu", "")
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "fastvlm.ops.dispatch", stub)
    text = env.backends("cpu")
    assert text.count("no compiler") == 1
    assert all(text.count(f"{name},") + text.count(f"{name}\n") == 1 for name in names)
    assert text.splitlines()[-1].split() == ["rope", "cpu"]


def test_build_prints_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = _stub(build=lambda: "/x/lib.so", available=lambda: True)
    monkeypatch.setitem(sys.modules, "fastvlm.extension", stub)
    assert main(["build"]) == 0
    assert capsys.readouterr().out == "/x/lib.so\n"


@pytest.mark.parametrize(
    "stub",
    [
        _stub(build=_raise),
        _stub(build=lambda: "/x/lib.so", available=lambda: False, reason=lambda: "no compiler"),
    ],
)
def test_build_that_fails_says_why(
    stub: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastvlm.extension", stub)
    assert main(["build"]) == 1
    assert "no compiler" in capsys.readouterr().err


def test_machine_is_recorded_without_the_hosts_name() -> None:
    stamp = env.stamp()
    assert set(stamp) == {"date", "machine", "versions"}
    assert stamp["machine"]["cpu"]["cores"] >= 1
    assert os.uname().nodename not in str(stamp["machine"])


def test_unknown_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nothing"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("missing", ["PIL", "transformers"])
@pytest.mark.parametrize("command", ["caption", "check"])
def test_a_command_without_its_packages_says_what_brings_them(command: str, missing: str) -> None:
    """One line, and the exit code of what cannot be done."""
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from fastvlm.__main__ import main\n"
        f"sys.exit(main([{command!r}, '--small']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTVLM_CPU": "0"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"fastvlm {command}: this command wants what pip install 'fastvlm[caption]' brings; "
        f"got no module {missing}\n"
    )


def test_tables() -> None:
    rows = [("a", "1"), ("long", "2")]
    assert text_table(("n", "v"), rows) == "n     v\n----  -\na     1\nlong  2"
    assert markdown_table(("n", "v"), rows[:1]) == "| n | v |\n| --- | --- |\n| a | 1 |"
