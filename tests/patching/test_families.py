"""A patched model of each family gives what the unpatched one gives: tokens, losses, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bert_models import BERTS
from gemma3_models import GEMMA3
from llama_models import LLAMAS
from models import FAMILIES, PAD, RELATIVES, Family
from pix2struct_models import PIX2STRUCT
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import fastvlm

BY_TURNS = {**RELATIVES, **BERTS, **GEMMA3, **LLAMAS, **PIX2STRUCT}
ALL = {**FAMILIES, **BY_TURNS}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-return-all": {"num_beams": 4, "num_return_sequences": 4},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "no-cache": {"num_beams": 2, "use_cache": False},
    "one-token": {"max_new_tokens": 1, "min_new_tokens": 1},
    "early-end": {"num_beams": 3, "min_new_tokens": 0, "no_repeat_ngram_size": 0},
}


@pytest.fixture(
    params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.turns(8)) for name in BY_TURNS)]
)
def family(request: pytest.FixtureRequest) -> Family:
    """Those whose parts are those of others run by turns."""
    return ALL[request.param]


def generate(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": 12, "min_new_tokens": 12, "no_repeat_ngram_size": 2}
    # nor a placeholder: without a cache a model would look for one more image
    image = getattr(model.config, "image_token_id", None)
    never = [PAD] if image is None else [PAD, image]
    return model.generate(**inputs, suppress_tokens=never, **{**defaults, **settings})


@pytest.mark.parametrize("case", CASES)
def test_generates_the_same_tokens(family: Family, case: str) -> None:
    model = family.build()
    inputs = family.inputs(model)
    expected = generate(model, inputs, **CASES[case])
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **CASES[case]), expected)
    if case not in ("one-token", "early-end"):
        assert len(set(expected.flatten().tolist())) > 5  # says something


def test_batch_of_one_and_no_padding(family: Family) -> None:
    model = family.build()
    inputs = {name: value[:1] for name, value in family.inputs(model).items()}
    expected = generate(model, inputs, num_beams=3)
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


def test_attentions_and_hidden_states_on_request(family: Family) -> None:
    model = family.build()
    model.set_attn_implementation("eager")
    inputs = family.inputs(model)
    ask = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    expected = generate(model, inputs, num_beams=2, **ask)
    fastvlm.patch(model)
    got = generate(model, inputs, num_beams=2, **ask)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("cross_attentions", "decoder_attentions", "attentions"):
        if name in expected:
            for ours, theirs in zip(got[name], expected[name]):
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_dtype(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
def test_losses_meet_the_error_rule(family: Family, dtype: torch.dtype) -> None:
    """Of several batches at once: a single number of PyTorch's may be right by luck."""
    model = family.build()
    batches = [family.training(model) for _ in range(6)]

    def losses(model: nn.Module, cast: torch.dtype) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(**in_dtype(batch, cast)).loss for batch in batches])

    with fastvlm.patched(oracle := family.build().double().train()), fastvlm.use("reference"):
        exact = losses(oracle, torch.float64)
    model = model.to(dtype).train()
    plain = losses(model, dtype)
    fastvlm.patch(model)
    ours = losses(model, dtype)
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


@DTYPES
def test_gradients_meet_the_error_rule(family: Family, dtype: torch.dtype) -> None:
    """By the worst of a few models where one breaks it: of few numbers PyTorch's may be lucky."""
    draws = [_errors(family, dtype, 0)]
    while (broken := _broken(draws)) and len(draws) < 4:
        draws.append(_errors(family, dtype, len(draws)))
    assert not broken, broken


def _errors(family: Family, dtype: torch.dtype, draw: int) -> dict[str, tuple[float, float, float]]:
    """Of each parameter how far ours and PyTorch's gradients are off, and what a rounding may be.

    The weights of a draw beyond the first lie a hundredth to either side.
    """

    def build() -> nn.Module:
        model, draws = family.build(), torch.Generator().manual_seed(draw)
        for parameter in model.parameters() if draw else ():
            parameter.data *= 1 + 0.01 * torch.randn(parameter.shape, generator=draws)
        return model

    model = build()
    batch = family.training(model)
    # transformers rounds to float32 in places whatever the model's dtype; the reference, which
    # tests/ops holds against plain formulas, does not
    with fastvlm.patched(oracle := build().double().train()), fastvlm.use("reference"):
        exact = gradients(oracle, in_dtype(batch, torch.float64))
    model = model.to(dtype).train()
    batch = in_dtype(batch, dtype)
    plain = gradients(model, batch)
    fastvlm.patch(model)
    grads = gradients(model, batch)
    assert grads.keys() == plain.keys()
    # the scale of a gradient's rounding is that of what it is a sum of, not of what cancels
    tiny = torch.finfo(dtype).eps * max(float(g.abs().max()) for g in exact.values())
    found = {}
    for name, want in exact.items():
        ours, theirs = (float((g[name].double() - want).abs().max()) for g in (grads, plain))
        found[name] = ours, theirs, tiny
    return found


def _broken(draws: list[dict[str, tuple[float, float, float]]]) -> list[str]:
    """The parameters whose gradients are further off than 3 times PyTorch's and a rounding."""
    found = []
    for name in draws[0]:
        ours, theirs, tiny = (max(each) for each in zip(*(draw[name] for draw in draws)))
        if not ours <= 3 * theirs + tiny:
            found.append(name)
    return found


@pytest.mark.parametrize("name", ["bart", "mbart", "florence2", "t5gemma", "florenz"])
def test_padded_positions_of_the_encoder_are_zero(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    fastvlm.patch(model)
    encoder = model.get_encoder()
    ids = inputs["input_ids"].clamp_max(90)
    states = encoder(input_ids=ids, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert (states[inputs["attention_mask"] == 0] == 0).all()
    assert (states[inputs["attention_mask"] == 1] != 0).any(-1).all()


@pytest.mark.parametrize("name", ["bart", "florence2", "t5gemma", "florenz"])
def test_cross_cache_is_held_once_per_image(name: str) -> None:
    """Four beams of three images: the cross cache holds three rows, not twelve."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    ask = {"num_beams": 4, "return_dict_in_generate": True}
    plain = generate(model, inputs, **ask).past_key_values.cross_attention_cache
    fastvlm.patch(model)
    shared = generate(model, inputs, **ask).past_key_values.cross_attention_cache
    k, _ = shared.layers[0].packed
    assert k.shape[0] == int(inputs["attention_mask"].sum())
    # who looks finds those of each beam, as in transformers
    seen = inputs["attention_mask"].bool().repeat_interleave(4, 0)
    for theirs, ours in zip(plain.layers, shared.layers):
        for name in ("keys", "values"):
            wanted = getattr(theirs, name).transpose(1, 2)
            got = getattr(ours, name).transpose(1, 2)
            assert got.shape == wanted.shape
            assert torch.allclose(got[seen], wanted[seen], atol=1e-5)


@pytest.mark.parametrize("name", ["bart", "florence2", "t5gemma", "florenz"])
def test_encoder_outputs_given_by_the_caller(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    ids = inputs["input_ids"].clamp_max(90)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state

    def given() -> dict[str, Any]:
        # generate() expands what it is given in place
        return {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask}

    expected = generate(model, given(), num_beams=3)
    fastvlm.patch(model)
    assert torch.equal(generate(model, given(), num_beams=3), expected)


@pytest.mark.parametrize("name", ["bart", "florence2", "t5gemma", "florenz", "gemma2"])
def test_several_tokens_on_a_filled_cache(name: str) -> None:
    """A forward pass with two new tokens per row after a prefill keeps transformers' result."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].inputs(model)
    first, more = torch.full((3, 3), 7), torch.tensor([[8, 9], [10, 11], [12, 13]])

    def run() -> Tensor:
        if name == "gemma2":
            mask = torch.ones(3, 3)
            out = model(input_ids=first, attention_mask=mask, use_cache=True)
            mask = torch.ones(3, 5)
            cache = out.past_key_values
            return model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        out = model(**batch, decoder_input_ids=first, use_cache=True)
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state),
            attention_mask=batch["attention_mask"],
            decoder_input_ids=more,
            past_key_values=out.past_key_values,
        ).logits

    with torch.no_grad():
        expected = run()
        fastvlm.patch(model)
        assert torch.allclose(run(), expected, atol=1e-4)
