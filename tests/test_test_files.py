"""Test files as a whole: they are collected together, on machines that lack this or that."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
# what a machine has that runs tests at all (`make rehearse-gpu` installs it), and what is ours
THERE = {
    *("torch", "transformers", "triton", "numpy", "packaging", "PIL", "pytest", "safetensors"),
    *("tokenizers", "fastvlm", "benchmarks", "tools"),
}


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports a test file by its name alone."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def imported(path: Path) -> Iterator[str]:
    """The packages that a file imports before anything in it runs."""
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        yield from (name.partition(".")[0] for name in names)


def optional() -> set[str]:
    """What tests/conftest.py looks for: there are others of its name, so it is read."""
    for node in ast.parse((TESTS / "conftest.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONAL":
            return set(ast.literal_eval(node.value))
    raise AssertionError("tests/conftest.py has no OPTIONAL")


def test_what_test_files_import_is_there_or_they_are_left_out() -> None:
    """Otherwise the tests of a machine without that package end before the first has run."""
    known = {*THERE, *optional(), *sys.stdlib_module_names}
    known |= {path.stem for path in TESTS.rglob("*") if path.is_dir() or path.suffix == ".py"}
    found = {(path.name, name) for path in TESTS.rglob("test_*.py") for name in imported(path)}
    assert sorted(pair for pair in found if pair[1] not in known) == []
    assert {name for _, name in found} >= optional()
