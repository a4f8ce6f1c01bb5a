"""transformers' StaticCache: the same tokens, one graph for all steps, fastvlm's ops in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, Family
from test_families import generate
from torch import Tensor, nn
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from fastvlm.run import static

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "one-row": {},
}
# those whose attention is patched; PaliGemma of transformers 5.23 fails with a static cache
OURS = ["bart", "florence2", "florenz", "gemma2", "mbart", "t5gemma", "whisper"]
ENCODERS = [name for name in OURS if name != "gemma2"]
STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the static cache was read by the fused path."""
    calls: Counter[str] = Counter()

    def counted(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] += 1
            return run(*args, **kwargs)

        return call

    for name in ("self_attend", "cross_attend"):
        monkeypatch.setattr(static, name, counted(name, getattr(static, name)))
    return calls


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", CASES)
def test_generates_the_same_tokens(name: str, case: str, steps: Counter[str]) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    if case == "one-row":
        inputs = {name: value[:1] for name, value in inputs.items()}
    expected = generate(model, inputs, **STATIC, **CASES[case])
    assert torch.equal(generate(model, inputs, **CASES[case]), expected)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **STATIC, **CASES[case]), expected)
    assert len(set(expected.flatten().tolist())) > 5
    encodes = model.config.is_encoder_decoder
    # two layers; the prefill of a decoder alone has more than one token
    assert steps["self_attend"] == 2 * (12 if encodes else 11)
    assert steps["cross_attend"] == (2 * 12 if encodes else 0)


def compiled_graphs(
    family: Family, patched: bool, run: Callable[[nn.Module, dict[str, Tensor], Any], Tensor]
) -> tuple[Tensor, list[Counter[str]]]:
    """The tokens, and how often each op stands in each graph that was compiled for them."""
    graphs: list[Counter[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        graphs.append(Counter(call for call in calls if call.startswith("fastvlm.")))
        return module.forward

    model = family.build()
    if patched:
        fastvlm.patch(model)
    inputs = family.inputs(model)
    tokens = run(model, inputs, backend)
    count = len(graphs)
    assert torch.equal(run(model, inputs, backend), tokens)
    assert len(graphs) == count > 0  # a second call of these shapes compiles nothing
    torch.compiler.reset()
    return tokens, graphs


def automatic(model: nn.Module, inputs: dict[str, Tensor], backend: Any) -> Tensor:
    """As generate() does by itself on a GPU: the steps, without the prefill."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return generate(model, inputs, **STATIC, compile_config=config)


def sampled(model: nn.Module, inputs: dict[str, Tensor], backend: Any) -> Tensor:
    config = CompileConfig(fullgraph=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return generate(model, inputs, **STATIC, **CASES["sample"], compile_config=config)


def whole(model: nn.Module, inputs: dict[str, Tensor], backend: Any) -> Tensor:
    """As in transformers' documentation, prefill included; beams are compiled so alone."""
    if "forward" not in vars(model):
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return generate(model, inputs, **STATIC, num_beams=2)


# how generate() compiles is every family's own; the other ways differ by the kind of decoder
RUNS = [(automatic, name) for name in OURS if name != "mbart"]
RUNS += [(sampled, name) for name in ("bart", "t5gemma")]
RUNS += [(whole, name) for name in ("florence2", "gemma2")]


@pytest.mark.turns(3)
@pytest.mark.parametrize(("run", "name"), RUNS, ids=lambda x: getattr(x, "__name__", x))
def test_compiles_to_the_graphs_that_transformers_compiles_to(run: Any, name: str) -> None:
    family = FAMILIES[name]
    expected, theirs = compiled_graphs(family, False, run)
    tokens, ours = compiled_graphs(family, True, run)
    assert torch.equal(tokens, expected)
    assert len(ours) <= len(theirs)
    encodes = name in ENCODERS
    assert ours[-1]["fastvlm.cached_attention.default"] == (4 if encodes else 2)
    mlp = "geglu_mlp" if name in ("gemma2", "t5gemma", "florenz") else "gelu_mlp"
    assert ours[-1][f"fastvlm.{mlp}.default"] == 2


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_inductor(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    expected = generate(model, inputs)
    fastvlm.patch(model)
    assert torch.equal(automatic(model, inputs, "inductor"), expected)


# Whisper's generate() takes what it returns apart
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "whisper"])
def test_cross_cache_is_held_once_per_image(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    fastvlm.patch(model)
    out = generate(model, inputs, **STATIC, num_beams=4, return_dict_in_generate=True)
    cache = out.past_key_values
    assert cache.cross_attention_cache.layers[0].keys.shape[0] == 3
    assert cache.self_attention_cache.layers[0].keys.shape[0] == 12


@pytest.mark.parametrize("name", ["bart", "t5gemma", "florenz"])
def test_prefixes_with_padding(name: str, steps: Counter[str]) -> None:
    model = FAMILIES[name].build()
    ids = torch.tensor([[2, 2, 2, 7], [2, 8, 9, 10], [2, 2, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    given = {"decoder_input_ids": ids, "decoder_attention_mask": mask, **STATIC}
    inputs = FAMILIES[name].inputs(model)
    expected = generate(model, inputs, **given, num_beams=2)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **given, num_beams=2), expected)
    assert steps["self_attend"] == 22  # not the prefill of four tokens
    assert steps["cross_attend"] == 24


@pytest.mark.parametrize("name", OURS)
def test_attentions_on_request(name: str, steps: Counter[str]) -> None:
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    inputs = FAMILIES[name].inputs(model)
    ask = {"output_attentions": True, "return_dict_in_generate": True, **STATIC}
    expected = generate(model, inputs, num_beams=2, **ask)
    fastvlm.patch(model)
    got = generate(model, inputs, num_beams=2, **ask)
    assert not steps
    assert torch.equal(got.sequences, expected.sequences)
    part = "decoder_attentions" if name in ENCODERS else "attentions"
    for ours, theirs in zip(got[part], expected[part], strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def empty_cache(model: nn.Module, source: int, length: int = 8) -> Any:
    config = model.config.get_text_config(decoder=True)
    own = StaticCache(config, max_cache_len=length)
    if not model.config.is_encoder_decoder:
        return own
    return EncoderDecoderCache(own, StaticCache(config, max_cache_len=source))


@pytest.mark.parametrize("name", ["bart", "gemma2"])
@pytest.mark.parametrize("bias", [False, True])
def test_calls_without_generate(name: str, bias: bool, steps: Counter[str]) -> None:
    """Two tokens, then one at a time; with a mask of numbers to add, transformers' attention."""
    model = FAMILIES[name].build()
    if bias:
        model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    encodes = model.config.is_encoder_decoder
    prefix = "decoder_" if encodes else ""
    states = BaseModelOutput(torch.randn(2, 5, 32)) if encodes else None

    def logits() -> Tensor:
        cache = empty_cache(model, 5)
        found = []
        for first, last in ((0, 2), (2, 3), (3, 4)):
            given: dict[str, Any] = {prefix + "input_ids": ids[:, first:last]}
            if encodes:
                given["encoder_outputs"] = states
            if bias:
                slots = torch.arange(8) <= torch.arange(first, last).unsqueeze(1)
                added = torch.where(slots, -0.5 * torch.arange(8.0), torch.finfo().min)
                given[prefix + "attention_mask"] = added.expand(2, 1, -1, -1)
            with torch.no_grad():
                found.append(model(**given, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, 1)

    if name == "gemma2" and bias:
        model.config.sliding_window = 8  # one mask for both kinds of layers
    expected = logits()
    fastvlm.patch(model)
    assert torch.allclose(logits(), expected, atol=1e-4)
    # Gemma's own masks are numbers to add: only generate() makes others
    assert steps["self_attend"] == (4 if name == "bart" and not bias else 0)


def test_rows_that_read_any_prompt() -> None:
    """prompt_of_target names the encoder row of each, in any order."""
    model = FAMILIES["florenz"].build()
    inputs = FAMILIES["florenz"].inputs(model)
    index = torch.tensor([2, 0, 2, 1])
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]])

    def logits(cache: Any) -> Tensor:
        with torch.no_grad():
            found = [
                model(
                    **inputs,
                    decoder_input_ids=part,
                    prompt_of_target=index,
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits
                for part in ([ids] if cache is None else ids.split(1, 1))
            ]
        return torch.cat(found, 1)

    expected = logits(None)
    fastvlm.patch(model)
    cache = empty_cache(model, inputs["input_ids"].shape[1])
    assert torch.allclose(logits(cache), expected, atol=1e-4)
    assert cache.cross_attention_cache.layers[0].keys.shape[0] == 3


def test_a_cross_cache_that_transformers_filled(steps: Counter[str]) -> None:
    """Patched in the middle: its rows are those of the readers, and transformers goes on."""
    model = FAMILIES["bart"].build()
    states = BaseModelOutput(torch.randn(2, 5, 32))

    def logits(patch_between: bool) -> Tensor:
        cache, found = empty_cache(model, 5), []
        for ids in ([[5], [6]], [[7], [8]]):
            given = {"decoder_input_ids": torch.tensor(ids), "encoder_outputs": states}
            with torch.no_grad():
                found.append(model(**given, past_key_values=cache, use_cache=True).logits)
            if patch_between:
                fastvlm.patch(model)
        return torch.cat(found, 1)

    expected = logits(False)
    assert torch.allclose(logits(True), expected, atol=1e-4)
    assert not steps
