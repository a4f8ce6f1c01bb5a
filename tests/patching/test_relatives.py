"""M2M100 (NLLB), Marian, Pegasus, Blenderbot: BART's relatives, each with positions of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, PAD, RELATIVES, VOCAB
from sameness import assert_the_same, assert_trains_the_same, assert_writes_the_same, numbers
from test_families import generate
from test_loss_without_logits import Calls
from torch import Tensor, nn

import fastvlm
from fastvlm import ops
from fastvlm.cpu.int8 import unavailable
from fastvlm.decoding.prefixes import left_padded, row_positions
from fastvlm.patching.weights import runs_in

NAMES = list(RELATIVES)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "forced": {"num_beams": 2, "forced_bos_token_id": 7, "forced_eos_token_id": 2},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_by_a_step_that_is_written_down(name: str, steps: list[Any]) -> None:
    model = RELATIVES[name].build()
    inputs = RELATIVES[name].inputs(model)
    assert_writes_the_same(model, inputs, CASES, steps)


@pytest.mark.parametrize("name", NAMES)
def test_training_in_both_forms_of_checkpoints_and_without(name: str) -> None:
    plain = RELATIVES[name].build().train()
    batch = RELATIVES[name].training(plain)
    assert_trains_the_same(plain, batch)


@pytest.mark.parametrize("name", [name for name in NAMES if "gpt2" not in name])
def test_several_targets_read_one_sentence(name: str) -> None:
    plain = RELATIVES[name].build().train()
    batch = dict(RELATIVES[name].training(plain))
    reads = torch.tensor([2, 0, 0, 1, 2])
    labels = torch.randint(3, VOCAB, (5, 6), generator=torch.Generator().manual_seed(0))
    labels[1, 3:] = labels[3, 4:] = -100
    batch["labels"] = labels
    want = numbers(plain, batch | {n: batch[n][reads] for n in ("input_ids", "attention_mask")})
    fastvlm.patch(plain)
    assert_the_same(numbers(plain, {**batch, "prompt_of_target": reads}), want)


def logits_of_steps(
    model: nn.Module, ids: Tensor, mask: Tensor | None, tokens: list[list[int]]
) -> list[Tensor]:
    """Of the last token of a prefill, then of each of a few steps."""
    source = torch.tensor([[9, 8, 7, 2], [5, 2, PAD, PAD]])
    past, found = None, []
    with torch.no_grad():
        for new in (ids, *(torch.tensor(t).unsqueeze(1) for t in tokens)):
            if past is not None and mask is not None:
                mask = torch.cat([mask, torch.ones_like(new)], 1)
            out = model(
                input_ids=source,
                attention_mask=(source != PAD).long(),
                decoder_input_ids=new,
                decoder_attention_mask=mask,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            found.append(out.logits[:, -1])
    return found


@pytest.mark.parametrize(
    ("ids", "tokens"),
    {
        "pads in front": ([[2, 7, 8], [PAD, 2, 9]], [[10, 11], [12, 13]]),
        "a pad that was written": ([[2], [2]], [[7, PAD], [PAD, 8], [9, 10]]),
        "pads behind": ([[2, 7, 8], [2, 9, PAD]], [[10, 11], [12, 13]]),
    }.values(),
    ids=["pads-in-front", "a-pad-that-was-written", "pads-behind"],
)
def test_m2m100_counts_tokens(
    ids: list[list[int]], tokens: list[list[int]], steps: list[Any]
) -> None:
    """A pad token stands nowhere, whether it is masked or was written; steps count columns."""
    model = RELATIVES["m2m_100"].build()
    first = torch.tensor(ids)
    for mask in (None, (first != PAD).long()):
        plain, ours = copy.deepcopy(model), copy.deepcopy(model)
        fastvlm.patch(ours)
        want = logits_of_steps(plain, first, mask, tokens)
        for got, right in zip(logits_of_steps(ours, first, mask, tokens), want):
            assert torch.allclose(got, right, atol=1e-4)
    assert steps
    assert None not in steps


def test_m2m100_beyond_its_table() -> None:
    """Waves of any length: the table grows where a sentence is longer, as in transformers."""
    model = RELATIVES["m2m_100"].build(max_position_embeddings=8)
    ids = torch.randint(3, VOCAB, (2, 21), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "num_beams": 2}
    plain = copy.deepcopy(model)
    fastvlm.patch(model)
    expected = generate(plain, {"input_ids": ids}, **settings)
    assert torch.equal(generate(model, {"input_ids": ids}, **settings), expected)


def test_a_watched_table_is_called(steps: list[Any]) -> None:
    model = RELATIVES["m2m_100"].build()
    inputs = {"input_ids": torch.tensor([[9, 8, 7, 2]])}
    expected = generate(model, inputs)
    fastvlm.patch(model)
    seen: list[int] = []
    model.model.decoder.embed_positions.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(generate(model, inputs), expected)
    assert len(seen) == 12
    assert set(steps) == {None}


def test_prefixes_of_several_lengths_in_marian() -> None:
    """Rows padded on the left count their positions from their own start."""
    model = RELATIVES["marian"].build()
    fastvlm.patch(model)
    rows = [[2, 7, 8, 9], [2, 5]]
    inputs = RELATIVES["marian"].inputs(model)
    inputs = {name: value[:2] for name, value in inputs.items()}
    ids, mask, pads = left_padded(rows, torch.device("cpu"))
    assert mask is not None
    with row_positions(model, pads):
        got = generate(model, inputs, decoder_input_ids=ids, decoder_attention_mask=mask)
    for index, row in enumerate(rows):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        alone = generate(model, one, decoder_input_ids=torch.tensor([row]))
        assert torch.equal(got[index, -12:], alone[0, -12:])


@pytest.mark.parametrize("name", ["pegasus", "blenderbot_small"])
def test_a_bias_of_the_logits(name: str) -> None:
    """final_logits_bias, as published models have it: in the loss and in the ranking of beams."""
    model: Any = RELATIVES[name].build()
    with torch.no_grad():
        model.final_logits_bias.copy_(3 * torch.randn(1, VOCAB))
    inputs, batch = RELATIVES[name].inputs(model), RELATIVES[name].training(model)
    expected, want = generate(model, inputs, num_beams=3), numbers(model, batch)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("name", ["m2m_100", "marian"])
def test_training_runs_on_the_tokens_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RELATIVES[name].build().train()
    batch = RELATIVES[name].training(model)
    fastvlm.patch(model)
    calls = Calls(monkeypatch, "gelu_mlp")
    model(**batch).loss.backward()
    sizes = {int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())}
    assert set(calls.rows["gelu_mlp"]) == sizes


@pytest.mark.parametrize(("name", "activation"), [("m2m_100", "relu"), ("marian", "silu")])
def test_int8_arithmetic_has_the_same_activation(
    name: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (why := unavailable()) is not None:
        pytest.skip(why)
    model = RELATIVES[name].build()
    encoder = model.get_encoder()
    ids = torch.randint(3, VOCAB, (10, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        fastvlm.patch(model, compute="int8")
        mlp = runs_in("int8")["gelu_mlp"]
        asked, run = [], getattr(ops, mlp)
        monkeypatch.setattr(
            ops, mlp, lambda *x, **kind: asked.append(kind["activation"]) or run(*x, **kind)
        )
        got = encoder(ids).last_hidden_state
    assert asked == [activation] * 2
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_another_form_of_the_same_activation_is_seen() -> None:
    model = FAMILIES["bart"].build().eval()
    layers = (*model.model.encoder.layers, *model.model.decoder.layers)
    for layer in layers:
        layer.activation_fn = nn.GELU()
    fastvlm.patch(model)
    for layer in layers:
        layer.activation_fn = nn.GELU("tanh")
    inputs = FAMILIES["bart"].training(model)
    with torch.no_grad():
        ours = model(**inputs).logits
        fastvlm.unpatch(model)
        assert torch.allclose(ours, model(**inputs).logits, atol=1e-5)
