"""The decoder in other engines: the tokens of transformers' own, through the same generate()."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from error_rule import FORWARD, check
from torch import Tensor

# the benchmarks are not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import decoder_engines, decoder_graph, decoding_engines, engines, measure, report
from benchmarks import steps as decoding_steps

ENGINES = {"onnxruntime": decoder_engines.OnnxRuntime, "openvino": decoder_engines.OpenVino}
# OpenVINO 2026.4 now and then brings down the process that it runs in, and all its tests with it
ALONE = "FASTVLM_TEST_OPENVINO"
TOKENS = 24


@functools.cache
def tiny() -> tuple[decoding_steps.Captioning, Tensor]:
    """A tiny model behind its encoder, and transformers' tokens of all beams."""
    captioning = decoding_steps.random_captioning(True)
    captioning(TOKENS)
    assert captioning.tokens is not None
    return captioning, captioning.tokens


def openvino_may_run() -> None:
    if os.environ.get(ALONE) != "1":
        pytest.skip(f"OpenVINO can crash the test process: run these alone, with {ALONE}=1")


def session(engine: str, kind: str) -> Any:
    if engine == "openvino":
        openvino_may_run()
    if not engines.available(engine):
        pytest.skip(measure.MISSING[engine])
    captioning, _ = tiny()
    model, keys = captioning.model, captioning.states.shape[1]
    decoder = model.model.language_model.decoder
    return ENGINES[engine](decoder, model.lm_head, kind, decoding_steps.BEAMS, keys)


@pytest.mark.parametrize("kind", decoder_graph.KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_the_tokens_of_transformers(
    engine: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioning, expected = tiny()
    model = decoder_engines.EngineModel(captioning.model, session(engine, kind))
    theirs = captioning.by(model)
    threads = torch.get_num_threads()
    for _ in range(2):  # a second caption begins with an empty past
        theirs(TOKENS)
        assert theirs.tokens is not None
        assert torch.equal(theirs.tokens, expected)
    assert torch.get_num_threads() == threads
    # beams change places in these captions: an engine that keeps its rows gives others
    monkeypatch.setattr(decoder_engines._Past, "reorder_cache", lambda *_: None)
    theirs(TOKENS)
    assert not torch.equal(theirs.tokens, expected)


@pytest.mark.parametrize("kind", decoder_graph.KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_those_of_transformers(engine: str, kind: str) -> None:
    """Of rows that differ, step by step, beams changing places."""
    captioning, _ = tiny()
    model, rows = captioning.model, decoding_steps.BEAMS
    states = captioning.states.expand(rows, -1, -1)
    runs = session(engine, kind)
    decoder = model.model.language_model.decoder
    picks = torch.Generator().manual_seed(5)
    ids = torch.empty(rows, 0, dtype=torch.long)
    with torch.no_grad():
        precise, precise_head = (
            copy.deepcopy(decoder).double(),
            copy.deepcopy(model.lm_head).double(),
        )
        runs.begin(decoder_graph.cross_inputs(decoder, states, kind))
        for position in range(20):
            beam = torch.randint(0, rows, (rows,), generator=picks)
            token = torch.randint(4, 500, (rows, 1), generator=picks)
            ids = torch.cat([ids[beam], token], 1)
            runs.inputs["token"][:] = token[:, 0].numpy()
            runs.inputs["position"][0] = position
            runs.inputs["beam"][:] = beam.numpy()
            answers = [
                head(
                    stack(
                        ids, encoder_hidden_states=states.to(head.weight.dtype), use_cache=False
                    ).last_hidden_state[:, -1]
                )
                for stack, head in ((decoder, model.lm_head), (precise, precise_head))
            ]
            check(f"step {position}", runs.run(), *answers, FORWARD)


def test_another_activation_is_refused() -> None:
    pytest.importorskip("onnx")
    captioning, _ = tiny()
    decoder = captioning.model.model.language_model.decoder
    before = decoder.config.activation_function
    decoder.config.activation_function = "relu"
    try:
        with pytest.raises(ValueError, match="relu"):
            decoder_graph.step_model(decoder, captioning.model.lm_head, "products", 3, 5)
    finally:
        decoder.config.activation_function = before


def test_only_a_right_engine_counts() -> None:
    def side(ms: float, weights: str = "float32", right: bool = True) -> dict[str, Any]:
        return {"weights": weights, "ms": ms, "identical_tokens": right}

    sides = {
        "transformers": side(1.0),
        "onnxruntime, products": side(2.0, right=False),
        "onnxruntime, operator": side(6.0),
        "openvino, operator": side(5.0),
        "openvino, bf16 arithmetic": side(3.0, "bf16"),
        "fastvlm": side(4.0),
        "fastvlm, bf16": side(2.0, "bf16"),
    }
    found = decoding_engines.compared(sides)
    assert found["fastest_engine"] == "openvino, operator"
    assert found["ratio"] == {"fastvlm": 1.25, "fastvlm, bf16": 2.5}
    assert decoding_engines.compared({"fastvlm": side(4.0)})["fastest_engine"] is None


@pytest.mark.slow
def test_the_benchmark_and_its_report(tmp_path: Path) -> None:
    openvino_may_run()
    path = tmp_path / "decoding-engines-cpu.json"
    assert decoding_engines.main(["--small", "--all", "--rounds", "1", "--out", str(path)]) == 0
    figures = json.loads(path.read_text())
    exact = {name for name, side in figures["sides"].items() if side["weights"] == "float32"}
    assert {"transformers", "fastvlm"} <= exact
    for engine in ENGINES:
        forms = {name for name in exact if name.startswith(engine)}
        assert bool(forms) == engines.available(engine)
        assert (engine in figures["missing_baselines"]) != engines.available(engine)
        inexact = {name for name in figures["sides"] if name.startswith(engine)} - exact
        assert bool(inexact) == engines.available(engine)
    page = report.write(tmp_path).read_text()
    assert "fastvlm, bf16" in page
    assert "at least 1.5x" in page or figures["fastest_engine"] is None
