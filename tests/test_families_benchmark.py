"""The benchmark of the families: its sides give the same texts, and its file says what it ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# the benchmarks are not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.families import __main__ as families
from benchmarks.families import translator
from benchmarks.families.work import BASE, ENGINE, OURS, WORKS


def test_tiny_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "stream_bandwidth", lambda device: 1e10)
    out = tmp_path / "families.json"
    only = ["--only", "T5-base, 512", "BLIP", "a step of training, 8"]
    assert families.main(["--small", "--rounds", "1", "--out", str(out), *only]) == 0
    cases = {case["case"].split("-")[0]: case for case in json.loads(out.read_text())["cases"]}
    assert list(cases) == ["Flan", "BLIP"]
    assert len(capsys.readouterr().out.splitlines()) > 6
    # what is asked for again takes the place of what was there
    assert families.main(["--small", "--rounds", "1", "--out", str(out), "--only", "BLIP"]) == 0
    kept = json.loads(out.read_text())
    assert len(kept["cases"]) == 3
    for case in kept["cases"]:
        assert case["small"]
        assert case["median"][OURS] == case["seconds"][OURS][0]
        if "identical_tokens" in case:
            assert case["identical_tokens"][OURS]
            assert case["floor"] > 0
    if not translator.available():
        assert ENGINE in kept["missing_baselines"]


# not T5: CTranslate2 4.8.5 scores its texts otherwise than transformers' forward does
@pytest.mark.parametrize("name", ["NLLB", "Whisper-small, 1500"])
def test_the_engine_writes_what_transformers_writes(name: str) -> None:
    if not translator.available():
        pytest.skip("ctranslate2 is not installed: pip install fastvlm[bench]")
    work = next(work for work in WORKS if name in work.name)
    sides = work.make(True).sides
    texts = {side: sides[side](6) for side in (BASE, ENGINE)}
    assert texts[ENGINE].tolist() == texts[BASE].tolist()


def test_a_work_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        families.main(["--only", "Donut-huge", "--out", str(tmp_path / "none.json")])
