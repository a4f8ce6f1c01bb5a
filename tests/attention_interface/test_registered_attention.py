"""attn_implementation="fastvlm": models that are not patched, named in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from error_rule import BACKWARD, FORWARD, check
from models import FAMILIES, PAD, _pad, _spread, _tokens
from sameness import numbers
from test_families import generate
from torch import Tensor, nn

import fastvlm
from fastvlm import ops
from fastvlm.attention_interface import library
from fastvlm.compat import attentions, versions


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    fastvlm.register_attention()
    yield
    fastvlm.unregister_attention()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which of the ops, and whether transformers' own attention, computed."""
    found: set[str] = set()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.add(name)
            return function(*args, **kwargs)

        return call

    for name in ("cross_attention", "self_attention", "cached_attention"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    monkeypatch.setattr(library, "attend", noted("library", library.attend))
    return found


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **SMALL, vocab_size=99, num_attention_heads=4, num_key_value_heads=2, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    return _spread(tf.LlamaForCausalLM(config), 0.2)


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = tf.BertConfig(**SMALL, vocab_size=99, num_attention_heads=4)
    return _spread(tf.BertForMaskedLM(config), 0.1)


def _vit() -> nn.Module:
    torch.manual_seed(0)
    config = tf.ViTConfig(**SMALL, num_attention_heads=4, image_size=16, patch_size=4, num_labels=3)
    return _spread(tf.ViTForImageClassification(config), 0.2)


def _causal_batch(model: nn.Module) -> dict[str, Tensor]:
    """Padding behind the texts; each row sees some key within the window of 5, for eager attention
    gives those that see none the mean of all."""
    ids, mask = _pad(_tokens(3, 9), [9, 5, 6], left=False)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == PAD, -100)}


def _vit_batch(model: nn.Module) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


BUILDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, Tensor]]]] = {
    **{
        name: (FAMILIES[name].build, FAMILIES[name].training)
        for name in ("bart", "florence2", "whisper", "t5gemma", "florenz", "paligemma2")
    },
    "gemma2": (FAMILIES["gemma2"].build, _causal_batch),
    "llama": (_llama, _causal_batch),
    "bert": (_bert, _causal_batch),
    "vit": (_vit, _vit_batch),
}


def _some(names: Iterable[str], always: Sequence[str], of: int = 3) -> list[Any]:
    """Those that are not always run take turns."""
    return [n if n in always else pytest.param(n, marks=pytest.mark.turns(of)) for n in names]


# what computes their training; PaliGemma's prefix sees both ways
TRAINS = {
    "bert": {"cross_attention"},
    "vit": {"cross_attention"},
    "llama": {"self_attention", "cross_attention"},  # padding behind a text sees the text
    **{key: {"self_attention", "cross_attention", "library"} for key in ("gemma2", "t5gemma")},
    "paligemma2": {"cross_attention", "library"},
}
GENERATING = ("bart", "florence2", "whisper", "gemma2", "t5gemma", "llama")
USUAL = {"gemma2": "eager", "t5gemma": "eager", "florenz": "eager", "paligemma2": "eager"}


@pytest.mark.parametrize("name", _some(BUILDS, ("bart", "gemma2", "llama", "bert", "vit")))
def test_a_step_of_training_is_the_same(name: str, used: set[str]) -> None:
    """Logits, loss and every gradient, by the error rule against float64."""
    build, batch_of = BUILDS[name]

    def run(attention: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = build().to(dtype)
        model.set_attn_implementation(attention)
        assert attentions.attention_of(model.config) == attention
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(model).items()}
        out = model(**batch)
        out.loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return out.logits.detach(), out.loss.detach(), torch.cat(grads)

    usual = USUAL.get(name, "sdpa")
    exact, theirs = run(usual, torch.float64), run(usual, torch.float32)
    used.clear()
    ours = run("fastvlm", torch.float32)
    assert used == TRAINS.get(name, {"self_attention", "cross_attention"})
    rows = _rows_that_see(batch_of(build()), name)
    check("logits", *(x[0][rows] for x in (ours, theirs, exact)), FORWARD)
    torch.testing.assert_close(ours[1], theirs[1])  # in float32, whatever the model is in
    check("gradients", *(x[2] for x in (ours, theirs, exact)), BACKWARD)


def _rows_that_see(batch: dict[str, Tensor], name: str) -> Any:
    """All rows, but those that see nothing, of which eager attention makes a mean."""
    if name != "paligemma2":
        return ...
    return batch["attention_mask"].bool()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name", _some(("bart", "florence2", "whisper", "gemma2", "t5gemma", "llama"), ())
)
def test_tokens_are_the_same(
    name: str, cache: str, settings: dict[str, Any], used: set[str]
) -> None:
    model: Any = BUILDS[name][0]().eval()
    inputs = FAMILIES["gemma2" if name == "llama" else name].inputs(model)
    if cache == "static":
        settings = {**settings, "cache_implementation": "static"}
    want = generate(model, inputs, **settings)
    model.set_attn_implementation("fastvlm")
    used.clear()
    assert torch.equal(generate(model, inputs, **settings), want)
    assert "cached_attention" in used


def test_named_when_a_model_is_made_or_loaded(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="fastvlm")
    assert attentions.attention_of(model.config) == "fastvlm"
    config = tf.LlamaConfig.from_pretrained(tmp_path)
    config._attn_implementation = "fastvlm"
    assert attentions.attention_of(tf.LlamaForCausalLM(config).config) == "fastvlm"
    model.save_pretrained(tmp_path / "again")
    assert "fastvlm" not in (tmp_path / "again/config.json").read_text()


def test_the_snippet_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    _llama().save_pretrained(tmp_path / "a-checkpoint")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], found)
    assert attentions.attention_of(found["model"].config) == "fastvlm"


def test_several_texts_in_a_row(used: set[str]) -> None:
    """By position_ids, and by the ends that collators add to them: each text by itself."""
    model: Any = _llama().eval()
    texts = [
        torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 3, 7)
    ]
    with torch.no_grad():
        want = torch.cat([model(x).logits for x in texts], 1)
        model.set_attn_implementation("fastvlm")
        row = torch.cat(texts, 1)
        positions = torch.cat([torch.arange(x.shape[1]) for x in texts])[None]
        ends = torch.tensor([0, 5, 8, 15], dtype=torch.int32)
        told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
        for more in ({}, told):
            used.clear()
            got = model(row, position_ids=positions, use_cache=False, **more).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert used == {"self_attention"}


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_attentions_are_given_where_they_are_asked_for(name: str) -> None:
    model: Any = FAMILIES[name].build().eval()
    batch = BUILDS[name][1](model)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(**batch, output_attentions=True)
        model.set_attn_implementation("fastvlm")
        got = model(**batch, output_attentions=True)
        plain = model(**batch)
    key = "decoder_attentions" if name == "bart" else "attentions"
    for ours, theirs in zip(got[key], want[key], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(got.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_dropout_of_attention_trains() -> None:
    model: Any = FAMILIES["bart"].build(attention_dropout=0.3).train()
    batch = FAMILIES["bart"].training(model)
    model.set_attn_implementation("fastvlm")
    losses = [model(**batch).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.turns(3)
def test_a_graph_is_whole() -> None:
    model: Any = FAMILIES["gemma2"].build(num_hidden_layers=1, layer_types=["full_attention"])
    inputs = _causal_batch(model)
    want = model(**inputs).loss
    model.set_attn_implementation("fastvlm")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, want)


@pytest.mark.parametrize("name", _some(("bart", "gemma2"), (), 2))
def test_patch_does_the_rest(name: str) -> None:
    """A model that names fastvlm's attention is patched as any other."""
    model: Any = FAMILIES[name].build()
    batch, inputs = FAMILIES[name].training(model), FAMILIES[name].inputs(model)
    want, tokens = numbers(model, batch), generate(model.eval(), inputs, num_beams=2)
    model.set_attn_implementation("fastvlm")
    report = fastvlm.patch(model, strict=name == "bart")
    assert "self_attention" in {op for entry in report.patched for op in entry.ops}
    torch.testing.assert_close(numbers(model, batch)[0], want[0])
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), tokens)
    fastvlm.unpatch(model)
    torch.testing.assert_close(numbers(model, batch)[0], want[0])


def test_a_model_without_sdpa_keeps_its_own(used: set[str]) -> None:
    """GPT-OSS has sinks, which its own eager attention alone adds."""
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **SMALL, vocab_size=99, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=2, num_experts_per_tok=1, sliding_window=4, pad_token_id=1,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model: Any = _spread(tf.GptOssForCausalLM(config), 0.2)
    model.set_attn_implementation("eager")
    batch = _causal_batch(model)
    with torch.no_grad():
        want = model(**batch).logits
        model.set_attn_implementation("fastvlm")
        torch.testing.assert_close(model(**batch).logits, want)
    assert used == {"library"}


def test_registered_once_and_taken_back() -> None:
    fastvlm.register_attention()
    fastvlm.register_attention()
    model: Any = _llama()
    model.set_attn_implementation("fastvlm")
    fastvlm.unregister_attention()
    fastvlm.unregister_attention()
    with pytest.raises(KeyError, match="fastvlm"):
        model(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="fastvlm"):
        _llama().set_attn_implementation("fastvlm")
    fastvlm.register_attention()
    model(torch.tensor([[3, 4]]))


def test_the_name_of_somebody_else_is_left_alone() -> None:
    fastvlm.unregister_attention()
    attentions.register_attention("fastvlm", print, attentions.whole_mask)
    try:
        with pytest.raises(RuntimeError, match="another attention under the name 'fastvlm'"):
            fastvlm.register_attention()
        fastvlm.unregister_attention()
        assert attentions.registered_attention("fastvlm")["attention"] is print
    finally:
        attentions.unregister_attention("fastvlm")


def test_older_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: "4.48.1")
    with pytest.raises(RuntimeError, match=r"needs transformers 5\.5 or newer, here is 4\.48\.1"):
        fastvlm.register_attention()
    fastvlm.unregister_attention()  # as if it had never been called
    monkeypatch.setattr(versions, "installed", lambda package: None)
    with pytest.raises(ImportError, match="needs transformers: pip install"):
        fastvlm.register_attention()
