"""The demo, end to end on a tiny model: what it prints, writes and returns, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.demo import compare as comparing
from benchmarks.demo import timing, workload
from fastvlm.__main__ import main
from fastvlm.checking import meters
from fastvlm.loading import random_florence2 as florence2


def test_writes_table_chart_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default beside whoever runs it, not over the results that are kept."""
    monkeypatch.chdir(tmp_path)
    code = main(["demo", "--small", "--new-tokens", "8", "--rounds", "2"])
    out, err = capsys.readouterr()
    assert code == 0
    for line in (
        "identical tokens",
        "decoding",
        "tokens per second",
        "peak memory",
        "fastvlm.patch",
    ):
        assert line in out
    assert "the weights are random" in out.lower()
    assert "run 2 of 2, fastvlm" in err
    folder = tmp_path / "fastvlm-demo"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"demo-cpu-small.{suffix}" for suffix in ("json", "svg", "png")}
    figures = json.loads((folder / "demo-cpu-small.json").read_text())
    assert set(figures) >= {
        "date", "machine", "versions", "workload", "identical_tokens", "sides", "ratio",
        "memory_method", "patch_report",
    }  # fmt: skip
    assert figures["identical_tokens"] is True
    assert figures["workload"]["image"] == "astronaut.png"
    for side in comparing.SIDES:
        measured = figures["sides"][side]
        assert measured["steps"] == 7
        assert len(measured["decoding_s"]["runs"]) == 2
        assert measured["ms_per_step"] > 0
        assert [len(beam) for beam in measured["tokens"]] == [9, 9, 9]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--image", "missing.png"], ["--image", "missing.png", "No such file"]),
        (["--image", __file__], ["--image", "an image that Pillow can read"]),
        (["--beams", "three"], ["--beams", "at least 1", "'three'"]),
        (["--new-tokens", "1"], ["--new-tokens", "at least 2", "got 1"]),
        (["--threads", "0"], ["--threads", "at least 1", "got 0"]),
        (["--out", __file__], ["--out", "a folder that can be written"]),
    ],
)
def test_bad_argument_is_one_line(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(["demo", "--small", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


def test_missing_model_folder_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = str(tmp_path / "nothing")
    assert main(["demo", "--model", given, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "--model" in err
    assert given in err


def test_different_tokens_fail_and_say_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = comparing.timed_run, []

    def wrong_in_the_end(work: workload.Workload, most_tokens: int | None = None) -> timing.Run:
        run = real(work, most_tokens)
        calls.append(run)
        if len(calls) == 4:  # two warm-ups, transformers, fastvlm
            run.tokens[1, 3] += 1
        return run

    monkeypatch.setattr(comparing, "timed_run", wrong_in_the_end)
    options = ["--small", "--new-tokens", "4", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 1
    out, err = capsys.readouterr()
    assert "NO" in out
    assert "run 1 of fastvlm differs first at beam 1, token 3" in err


def _tokens(pixels: torch.Tensor | None = None) -> torch.Tensor:
    photo, _ = florence2.load_photo(None)
    work = workload.random_workload(photo, beams=3, new_tokens=12, tiny=True)
    if pixels is not None:
        work.inputs["pixel_values"] = pixels
    return work.generate()


def test_random_weights_look_at_the_image_and_repeat() -> None:
    """Else "identical tokens" would say little."""
    first, again = _tokens(), _tokens()
    other = _tokens(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first[0].tolist())) >= 5
    assert len({tuple(beam) for beam in first.tolist()}) == 3


def test_florence2_base_has_its_true_size() -> None:
    from transformers import Florence2ForConditionalGeneration

    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(florence2.florence2_base())
    assert sum(p.numel() for p in model.parameters()) == 231_414_016
    assert model.lm_head.weight.shape == (51289, 768)


def test_pixels_are_florence2s(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "gray.png"
    Image.new("L", (40, 30), 255).save(path)
    photo, name = florence2.load_photo(str(path))
    pixels = florence2.to_pixels(photo, 64)
    assert name == "gray.png"
    assert pixels.shape == (1, 3, 64, 64)
    white = [(1 - m) / s for m, s in zip(florence2.IMAGE_MEAN, florence2.IMAGE_STD)]
    torch.testing.assert_close(pixels[0, :, 5, 7], torch.tensor(white))


def test_hooks_are_gone_and_phases_add_up() -> None:
    photo, _ = florence2.load_photo(None)
    work = workload.random_workload(photo, beams=2, new_tokens=5, tiny=True)
    run = timing.timed_run(work)
    assert min(run.vision, run.prefill, run.decoding) > 0
    assert run.steps == 4
    assert not any(module._forward_hooks for module in work.model.modules())


def test_memory_without_a_resettable_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters.HighWaterMeter, "permitted", staticmethod(lambda: False))
    photo, _ = florence2.load_photo(None)
    work = workload.random_workload(photo, beams=2, new_tokens=4, tiny=True)
    mib, method = timing.peak_memory(work)
    assert mib >= 0
    assert "sampled" in method
