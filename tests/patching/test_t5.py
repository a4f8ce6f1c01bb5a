"""T5 and its relatives: what is their own. The rest is tested with the other families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from models import PAD, RELATIVES, VOCAB, _t5_sizes
from sameness import assert_the_same, numbers
from test_families import generate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlm
from fastvlm.compat import hf
from fastvlm.generate.lean import Lean
from fastvlm.patching import interposed
from fastvlm.run import build

NAMES = ["t5", "flan_t5", "umt5"]
OPS = {"self_attention", "cross_attention", "cached_attention", "rms_norm", "linear_topk"}


def long_text(rows: int = 2, length: int = 40) -> dict[str, Tensor]:
    """Four times as long as distances are told apart; the second row is shorter."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, length - 7 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def training(length: int = 30) -> dict[str, Tensor]:
    labels = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(4))
    labels[0, 20:] = -100
    return {**long_text(), "labels": labels}


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_patched(name: str) -> None:
    report = fastvlm.patch(RELATIVES[name].build(), strict=True)
    mlp = "gelu_mlp" if name == "t5" else "geglu_mlp"
    assert {op for entry in report.patched for op in entry.ops} >= OPS | {mlp}


@pytest.mark.parametrize("name", NAMES)
def test_a_text_longer_than_its_distances(name: str) -> None:
    model = RELATIVES[name].build()
    settings = {"max_new_tokens": 30, "min_new_tokens": 30}
    expected = [generate(model, long_text(), num_beams=n, **settings) for n in (1, 3)]
    want = numbers(model, training())
    fastvlm.patch(model)
    for n, tokens in zip((1, 3), expected):
        assert torch.equal(generate(model.eval(), long_text(), num_beams=n, **settings), tokens)
    assert_the_same(numbers(model, training()), want)


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_the_table_of_distances_is_the_model_s(name: str) -> None:
    model: Any = RELATIVES[name].build()
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        bias = hf.bias_of_distances(attention)
        theirs = attention.compute_bias(30, 30)[0]
        distance = torch.arange(30) - torch.arange(30)[:, None]
        assert bias.shape == (4, 19)
        assert torch.equal(bias[:, distance.clamp(-9, 9) + 9], theirs)


@pytest.mark.parametrize("name", ["t5", "flan_t5"])
def test_padding_between_tokens_keeps_its_place(name: str) -> None:
    """Distances count columns there: the batch runs as transformers computes it."""
    model = RELATIVES[name].build()
    batch = training()
    batch["attention_mask"][:, 5:9] = 0
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    decoder_mask = torch.ones(2, 30)
    decoder_mask[:, 3:6] = 0
    want = numbers(model, batch), numbers(model, {**batch, "decoder_attention_mask": decoder_mask})
    expected = generate(model.eval(), inputs, num_beams=2)
    fastvlm.patch(model)
    assert_the_same(numbers(model, batch), want[0])
    assert_the_same(numbers(model, {**batch, "decoder_attention_mask": decoder_mask}), want[1])
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", [("attention",), ("attention", "norm"), ("mlp", "norm")])
def test_parts_of_it_alone(name: str, only: tuple[str, ...]) -> None:
    model = RELATIVES[name].build()
    inputs = RELATIVES[name].inputs(model)
    expected, want = generate(model, inputs, num_beams=2), numbers(model, training())
    fastvlm.patch(model, only=only)
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), expected)
    assert_the_same(numbers(model, training()), want)


def _logits(model: nn.Module, write: Any) -> list[Tensor]:
    """Of a prefill and two steps, the table of the decoder's distances written into between."""
    found, past = [], None
    with torch.no_grad():
        for new in ([[2, 7], [2, 8]], [[9], [10]], [[11], [12]]):
            out = model(
                **long_text(), decoder_input_ids=torch.tensor(new), past_key_values=past,
                use_cache=True,
            )  # fmt: skip
            past = out.past_key_values
            found.append(out.logits[:, -1])
            write(model)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_into_the_table_is_seen(name: str) -> None:
    def write(model: Any) -> None:
        for block in model.decoder.block:
            attention = block.layer[0].SelfAttention
            if attention.has_relative_attention_bias:
                attention.relative_attention_bias.weight.mul_(1.5)

    plain = RELATIVES[name].build()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    for got, want in zip(_logits(ours, write), _logits(plain, write)):
        assert torch.allclose(got, want, atol=2e-4)
    still = _logits(RELATIVES[name].build(), lambda model: None)
    assert not torch.allclose(still[2], want, atol=1e-2)


@pytest.mark.parametrize("path", ["layer.0", "layer.1", "layer.2", "layer.2.DenseReluDense.act"])
def test_who_looks_at_a_part_sees_what_is_there(path: str) -> None:
    """Modules that our layers do not call are called where somebody listens."""
    model: Any = RELATIVES["t5"].build()
    inputs = RELATIVES["t5"].inputs(model)
    expected = generate(model, inputs)
    fastvlm.patch(model)
    seen: list[tuple[int, ...]] = []
    part = model.decoder.block[1].get_submodule(path)
    part.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    assert torch.equal(generate(model, inputs), expected)
    assert len(seen) == 12
    assert all(len(shape) == 3 and shape[0] == 3 for shape in seen)


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_gated_mlp_drops_what_its_class_drops() -> None:
    """The same draws in training, and its activation in one pass."""
    plain: Any = RELATIVES["flan_t5"].build().train()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    found = []
    for model in (plain, ours):
        mlp = model.decoder.block[1].layer[-1].DenseReluDense
        mlp.dropout.p = 0.3
        x = torch.randn(2, 9, mlp.wi_0.in_features, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        with Operators() as ran:
            y = mlp(x.requires_grad_())
        y.cos().sum().backward()
        assert ("aten.tanh.default" in ran.found) == (model is plain)
        found.append((y.detach(), x.grad, *(p.grad for p in mlp.parameters())))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert (
        found[0][0] - ours.eval().decoder.block[1].layer[-1].DenseReluDense(x)
    ).abs().max() > 0.1


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_float16_is_kept_from_the_infinite(name: str) -> None:
    """Rows beyond float16's range are cut off behind each branch, as in transformers; the last
    weight of an MLP may be float32."""
    for keep in (False, True):
        plain: Any = RELATIVES[name].build().half()
        with torch.no_grad():
            for stack in (plain.encoder, plain.decoder):
                mlp = stack.block[0].layer[-1].DenseReluDense
                mlp.wo.weight.mul_(2000)
                if keep:
                    mlp.wo.float()
        ours = copy.deepcopy(plain)
        fastvlm.patch(ours)
        decoder = torch.tensor([[2, 7, 8], [2, 9, 4]])
        with torch.no_grad():
            want, got = (
                model(**long_text(), decoder_input_ids=decoder, use_cache=False).logits
                for model in (plain, ours)
            )
        assert want.isfinite().all()
        assert torch.allclose(got.float(), want.float(), atol=0.05 * want.abs().max().item())


def test_an_encoder_alone() -> None:
    torch.manual_seed(0)
    model = tf.T5EncoderModel(tf.T5Config(**_t5_sizes())).eval()
    batch = long_text()
    with torch.no_grad():
        want = model(**batch).last_hidden_state
        report = fastvlm.patch(model)
        got = model(**batch).last_hidden_state
    assert not report.skipped
    seen = batch["attention_mask"] == 1
    assert torch.allclose(got[seen], want[seen], atol=1e-5)
    assert (got[~seen] == 0).all()


def test_a_step_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tied model too, whose head reads its states times a number."""
    model = RELATIVES["t5"].build()
    inputs = RELATIVES["t5"].inputs(model)
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    calls: list[int] = []
    lean = Lean.__call__

    def counted(self: Any, tokens: Tensor) -> Tensor:
        calls.append(1)
        return lean(self, tokens)

    monkeypatch.setattr(Lean, "__call__", counted)
    made: list[Any] = []
    run = build.build_step
    monkeypatch.setattr(build, "build_step", lambda *a: made.append(run(*a)) or made[-1])
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert len(calls) == 10  # of twelve tokens: a prefill, and a step that is looked at
    assert made
    assert None not in made


def test_without_a_kernel_its_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for now: before a patch, and for a model that is moved there behind it."""
    reason = "no kernel on mars yet"
    model = RELATIVES["t5"].build()
    inputs = RELATIVES["t5"].inputs(model)
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model)
    with monkeypatch.context() as patch:
        patch.setattr(interposed, "without_kernel", lambda *stack: reason)
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(generate(model, inputs, num_beams=2), expected)
        later = RELATIVES["t5"].build()
        report = fastvlm.patch(later)
        assert {entry.reason for entry in report.skipped} >= {reason}
        assert torch.equal(generate(later, inputs, num_beams=2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_attention_that_does_not_say_it_is_causal(name: str) -> None:
    """As UMT5's of transformers 5.17: it is left alone, whatever its sdpa makes of that."""
    model: Any = RELATIVES[name].build()
    for block in model.decoder.block:
        block.layer[0].SelfAttention.is_causal = False
    want = numbers(model, training())
    report = fastvlm.patch(model)
    assert any("does not say" in str(entry.reason) for entry in report.skipped)
    assert_the_same(numbers(model, training()), want)
