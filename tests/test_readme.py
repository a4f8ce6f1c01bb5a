"""README and docs: figures are those of results, links lead somewhere, the first snippet runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import published
import pytest
import torch
from PIL import Image

from benchmarks import headline

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# as a string of its own: a macro of C++ has no quotes
VARIABLE = re.compile(r"\"(FASTVLM_[A-Z_]+)\"")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < 8 * 1024


def test_the_figures_are_those_of_the_results() -> None:
    for page, works in ((headline.README, headline.FIRST), (headline.PAGE, headline.ROWS)):
        text = page.read_text()
        block = text.partition(headline.BEGIN)[2].partition(headline.END)[0]
        assert block == headline.table(works=works), "python -m benchmarks.headline writes them"
    text = headline.README.read_text()
    block = text.partition(headline.BEGIN)[2].partition(headline.END)[0]
    outside = text.replace(block, "")
    assert not re.search(r"\d[.\d]*x\b", outside), "a figure that no file stands behind"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_snippets_are_python(page: Path) -> None:
    text = page.read_text()
    for target in LINK.findall(text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for snippet in SNIPPET.findall(text):
        ast.parse(snippet)


TRAINERS = sorted({*(ROOT / "docs/training").glob("*.md")} - {ROOT / "docs/training/index.md"})


@pytest.mark.parametrize("page", TRAINERS, ids=lambda page: page.stem)
def test_the_page_of_a_trainer_shows_the_program_that_is_tested(page: Path) -> None:
    """tests/packing/test_example_trainers.py and test_frameworks.py run what it links first."""
    text = page.read_text()
    program = next(target for target in LINK.findall(text) if "examples/" in target)
    shown = SNIPPET.findall(text)
    assert shown
    for snippet in shown:
        assert snippet in (page.parent / program).read_text()


def test_the_first_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny checkpoint in Microsoft's layout, and a photo."""
    config = published.microsoft_config(max_position_embeddings=200)
    folder = tmp_path / "microsoft" / "Florence-2-base"
    folder.parent.mkdir()
    torch.manual_seed(0)
    published.write(folder, config, published.weights(config))
    published.write_processor(folder)
    Image.new("RGB", (80, 60), (40, 90, 200)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = SNIPPET.search((ROOT / "README.md").read_text())
    assert snippet is not None
    exec(compile(snippet[1], "README.md", "exec"), {})
    assert "modules patched" in capsys.readouterr().out


def test_every_variable_stands_in_the_table() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    sources = [
        *(ROOT / "fastvlm").rglob("*.py"),
        ROOT / "setup.py",
        *(ROOT / "csrc").rglob("*.cpp"),
    ]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    assert read == set(re.findall(r"^\| `(FASTVLM_\w+)`", page, re.MULTILINE))
