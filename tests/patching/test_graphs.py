"""The planned step captured once and replayed: by a double here, as CUDA graphs on a GPU."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from graph_double import Double
from models import FAMILIES
from test_families import generate
from torch import Tensor, nn

import fastvlm
from fastvlm.decoding import rows
from fastvlm.run import graphs, step

PLANNED = ["bart", "florence2", "gemma2", "florenz", "t5gemma", "whisper"]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    found = Double()
    monkeypatch.setattr(graphs, "recorder", found)
    return found


def patched(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    fastvlm.patch(model, **settings)
    return model, inputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLANNED)
def test_replays_give_the_same_tokens(name: str, case: str, double: Double) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    expected = generate(model, inputs, max_new_tokens=20, **CASES[case])
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, max_new_tokens=20, **CASES[case]), expected)
    assert len(double.captured) == 1
    # of twenty tokens the prefill gives the first, and the first step runs as it is
    assert double.replays == 18


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", PLANNED)
def test_weights_in_fewer_bits(
    name: str, weights: str, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = patched(name, weights=weights)
    got = generate(model, inputs, num_beams=2)
    assert len(double.captured) == 1
    monkeypatch.setattr(graphs, "recorder", lambda x: None)
    assert torch.equal(generate(model, inputs, num_beams=2), got)


@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_cache_that_grows_is_captured_again(
    name: str, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROOM", 5)
    monkeypatch.setattr(rows, "make_room", lambda cache, positions: None)
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    wish = {"num_beams": 3, "max_new_tokens": 40, "min_new_tokens": 40}
    expected = generate(model, inputs, **wish)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **wish), expected)
    assert len(double.captured) == 4  # room for 6, 12, 24 and 48
    assert double.replays == 39 - 4  # the first step of each runs as it is
    assert len({tuple(ops) for ops in double.captured}) == 1


@pytest.mark.parametrize("name", ["bart", "gemma2", "t5gemma"])
def test_padded_prefixes(name: str, double: Double) -> None:
    """Rows that start in different columns, their beams changing places."""
    ids = torch.tensor([[2, 2, 2, 7], [2, 8, 9, 10], [2, 2, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    if name == "gemma2":
        inputs = {"input_ids": ids, "attention_mask": mask}
    else:
        inputs = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert double.replays == 10


def test_under_inference_mode_and_after(double: Double) -> None:
    model, inputs = patched("bart")
    expected = generate(model, inputs)
    with torch.inference_mode():
        assert torch.equal(generate(model, inputs), expected)
    cache = model.model.decoder.new_cache()
    given = {"encoder_outputs": (torch.randn(1, 4, 32),), "past_key_values": cache}

    def step(*tokens: int) -> Tensor:
        return model(**given, decoder_input_ids=torch.tensor([[t] for t in tokens])).logits

    with torch.inference_mode():
        for token in (2, 3, 4, 5):
            step(token, token + 1)
    with torch.no_grad():
        got = step(6, 7)
        ids = torch.tensor([[2, 3, 4, 5, 6], [3, 4, 5, 6, 7]])
        states = given["encoder_outputs"]
        whole = model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits
    assert torch.allclose(got, whole[:, -1:], atol=1e-4)


def test_rows_that_change_are_captured_again(double: Double) -> None:
    """Other rows, fewer positions, a reordering between two steps."""
    model, _ = patched("bart")
    cache = model.model.decoder.new_cache()
    given = {"encoder_outputs": (torch.randn(1, 4, 32),), "past_key_values": cache}

    def step(*tokens: int) -> Tensor:
        with torch.no_grad():
            ids = torch.tensor([[t] for t in tokens])
            return model(**given, decoder_input_ids=ids).logits

    def whole(*history: list[int]) -> Tensor:
        with torch.no_grad():
            return model(
                encoder_outputs=given["encoder_outputs"],
                decoder_input_ids=torch.tensor(history),
                use_cache=False,
            ).logits[:, -1:]

    for token in (2, 4, 6, 8):
        step(token, token + 1)
    assert double.replays == 2
    cache.reorder_cache(torch.tensor([1, 0]))
    got = step(10, 11)
    assert torch.allclose(got, whole([3, 5, 7, 9, 10], [2, 4, 6, 8, 11]), atol=1e-4)
    cache.self_attention_cache.crop(-2)
    got = step(12, 13)
    assert torch.allclose(got, whole([3, 5, 7, 12], [2, 4, 6, 13]), atol=1e-4)
    cache.self_attention_cache.batch_select_indices(torch.tensor([1, 0, 1]))
    step(14, 15, 16)
    got = step(20, 21, 22)
    histories = [2, 4, 6, 13, 14, 20], [3, 5, 7, 12, 15, 21], [2, 4, 6, 13, 16, 22]
    assert torch.allclose(got, whole(*histories), atol=1e-4)
    assert len(double.captured) == 2


@pytest.mark.usefixtures("young_collector")
def test_nothing_holds_a_cache(double: Double) -> None:
    model, _ = patched("bart")
    cache = model.model.decoder.new_cache()
    with torch.no_grad():
        for token in (3, 4, 5, 6):
            model(
                encoder_outputs=(torch.ones(1, 4, 32),),
                past_key_values=cache,
                decoder_input_ids=torch.tensor([[token]]),
            )
    assert double.replays == 2
    gc.collect()
    gc.disable()
    try:
        layer = weakref.ref(cache.self_attention_cache.layers[0])
        del cache
        assert layer() is None
    finally:
        gc.enable()


class TestTheDouble:
    """It must notice what a graph would get wrong."""

    def test_a_position_that_is_a_number(
        self, double: Double, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = rows.RowLayer.write

        def by_number(self: Any, start: Any, k: Tensor, v: Tensor) -> Any:
            if not isinstance(start, Tensor):
                return write(self, start, k, v)
            self.k[:, self.filled - 1], self.v[:, self.filled - 1] = k, v
            return self.k, self.v

        model, inputs = patched("bart")
        expected = generate(model, inputs)
        monkeypatch.setattr(rows.RowLayer, "write", by_number)
        assert not torch.equal(generate(model, inputs), expected)

    def test_lengths_that_are_replaced(
        self, double: Double, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill = graphs._Fixed.fill

        def replaced(self: Any, x: Tensor, at: Any) -> None:
            fill(self, x, at)
            self.at = self.at._replace(lengths=at.lengths.clone())

        model, inputs = patched("bart")
        expected = generate(model, inputs)
        monkeypatch.setattr(graphs._Fixed, "fill", replaced)
        assert not torch.equal(generate(model, inputs), expected)

    @pytest.mark.parametrize("ask", [Tensor.item, Tensor.nonzero, lambda x: torch.tensor([1])])
    def test_what_waits(self, double: Double, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        run = step.DecodeStep._called

        def asking(self: Any, x: Tensor, at: Any) -> Tensor:
            ask(x[0, 0])
            return run(self, x, at)

        model, inputs = patched("bart")
        expected = generate(model, inputs)
        assert double.captured
        double.captured.clear()
        monkeypatch.setattr(step.DecodeStep, "_called", asking)
        with pytest.warns(UserWarning, match="steps are not captured: aten"):
            assert torch.equal(generate(model, inputs), expected)
        assert not double.captured


@pytest.mark.parametrize("backends", [("triton",), ("cuda", "triton")])
def test_launchers_ask_for_no_value(
    backends: tuple[str, ...], double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step on tensors without values, by the launchers that a GPU would have."""
    from benchmarks.traffic import counter
    from benchmarks.traffic import steps as counted
    from benchmarks.traffic.inputs import Decoding
    from fastvlm.florenz import FlorenzConfig

    config = FlorenzConfig.reduced("3.5B", width=32)
    work = Decoding(images=2, beams=4, keys=50, filled=9)
    model = counted.model_of(config)
    counted.patched(model)
    x = counted.inputs_of(config, work, 1, counter.DEVICE)
    with torch.no_grad(), counter.as_on_cuda(), counted.known_lengths():
        with counter.Traffic(backends):
            counted.prefill(model, x, work)
        assert not double.captured
        with counter.Traffic(backends) as traffic:
            counted.states(model, x)
    assert len(double.captured) == 1
    assert double.captured[0].count("fastvlm::cached_attention") == config.decoder.num_hidden_layers
    kernels = [name for name in traffic.launches if name.startswith("fastvlm.")]
    assert any(name.startswith("fastvlm.cuda.") for name in kernels) == ("cuda" in backends)
    assert kernels


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never for tensors that are not on CUDA."""
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert graphs.recorder(torch.ones(1)) is None

    class OnCuda:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert isinstance(graphs.recorder(OnCuda()), graphs.CudaGraph)  # type: ignore[arg-type]
    monkeypatch.setenv(graphs.VARIABLE, "0")
    assert graphs.recorder(OnCuda()) is None  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLANNED)
def test_on_a_gpu(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    capture = graphs.CudaGraph.capture

    def counted(self: graphs.CudaGraph, run: graphs.Run) -> graphs.Run:
        captures.append(1)
        return capture(self, run)

    monkeypatch.setattr(graphs.CudaGraph, "capture", counted)
    monkeypatch.setattr(rows, "ROOM", 16)
    monkeypatch.setattr(rows, "make_room", lambda cache, positions: None)
    model, inputs = patched(name)
    model.cuda()
    inputs = {key: value.cuda() for key, value in inputs.items()}
    wish = {**CASES[case], "max_new_tokens": 40, "min_new_tokens": 40}
    monkeypatch.setenv(graphs.VARIABLE, "0")
    expected = generate(model, inputs, **wish)
    assert not captures
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert torch.equal(generate(model, inputs, **wish), expected)
    assert len(captures) > 1
