"""What only looks like a known class is tried before it is patched: the same, or left alone."""

from __future__ import annotations

import random
import time
from typing import Any

import models
import pytest
import torch
import trainer_copy
from torch import Tensor, nn

import fastvlm
from fastvlm.patching import probe, trials
from fastvlm.patching.classes import is_patched

FAMILIES = {**models.FAMILIES, **models.RELATIVES}
NORM_BEHIND = (
    "hidden_states = residual + hidden_states\n"
    "        hidden_states = self.self_attn_layer_norm(hidden_states)"
)
# the norm behind the layers hides how large their rows are
SCALED = tuple(
    f"hidden_states = {rows}\n\n        return hidden_states"
    for rows in ("residual + hidden_states", "1.01 * (residual + hidden_states)")
)
# family: name of the plant -> (text of transformers, what stands there instead)
PLANTS: dict[str, dict[str, tuple[str, str]]] = {
    "bart": {
        "norm within the branch": (
            NORM_BEHIND,
            "hidden_states = residual + self.self_attn_layer_norm(hidden_states)",
        ),
        "residual scale": (
            "hidden_states = residual + hidden_states\n"
            "        hidden_states = self.final_layer_norm(hidden_states)",
            "hidden_states = 0.9 * residual + hidden_states\n"
            "        hidden_states = self.final_layer_norm(hidden_states)",
        ),
        "scale": ("key.transpose(2, 3)) * scaling", "key.transpose(2, 3)) * (1.01 * scaling)"),
        "activation squared": (
            "self.activation_fn(self.fc1(",
            "self.activation_fn(1.1 * self.fc1(",
        ),
        "positions from three": ("position_ids + self.offset", "position_ids + self.offset + 1"),
        "embeddings scaled": ("* self.embed_scale", "* self.embed_scale * 1.5"),
        "not causal": ("is_causal=True,", "is_causal=False,"),
        "keys normalized": (
            "query_states = self.q_proj(hidden_states)",
            "query_states = nn.functional.normalize(self.q_proj(hidden_states), dim=-1)",
        ),
    },
    "gemma2": {
        "norm left out": (
            "hidden_states = self.post_attention_layernorm(hidden_states)\n",
            "hidden_states = hidden_states + 0 * self.post_attention_layernorm(hidden_states)\n",
        ),
        "window": (
            "self.sliding_window = config.sliding_window if",
            "self.sliding_window = config.sliding_window + 1 if",
        ),
        "softcap": ("attn_weights = attn_weights * softcap", "attn_weights = attn_weights * 4.9"),
        "RMS norm without offset": ("(1.0 + self.weight.float())", "(0.5 + self.weight.float())"),
        "layer scaled": (SCALED[0], SCALED[1]),
        "gate": ("self.act_fn(self.gate_proj(x))", "self.act_fn(1.702 * self.gate_proj(x))"),
        "rotation": ("(q * cos) + (rotate_half(q)", "(q * cos) - (rotate_half(q)"),
        "zero gate": (
            "        hidden_states = residual + hidden_states\n\n        residual",
            "        gate = 0.1 + 0 * residual.mean()\n"
            "        hidden_states = residual + hidden_states + gate * torch.tanh(residual)\n\n"
            "        residual",
        ),
    },
    "whisper": {
        "scale": (
            "(self.q_proj(hidden_states) * self.scaling)",
            "(self.q_proj(hidden_states) * 0.3)",
        ),
        "norm left out": (
            "hidden_states = self.final_layer_norm(hidden_states)\n",
            "hidden_states = hidden_states + 0 * self.final_layer_norm(hidden_states)\n",
        ),
        "one position further": ("self.weight[position_ids]", "self.weight[position_ids + 1]"),
    },
    "m2m_100": {
        "layer scaled": (SCALED[0], SCALED[1]),
        "activation": ("self.activation_fn(self.fc1(", "self.activation_fn(0.1 + self.fc1("),
        "one position further": (
            "past_key_values_length) * mask",
            "past_key_values_length + 1) * mask",
        ),
    },
    "marian": {
        "norm within the branch": (
            NORM_BEHIND,
            "hidden_states = residual + self.self_attn_layer_norm(hidden_states)",
        ),
        "one position further": ("forward(position_ids)", "forward(position_ids + 1)"),
    },
    "t5": {
        "layer scaled": (
            "hidden_states = self.layer[-1](hidden_states)",
            "hidden_states = 1.01 * self.layer[-1](hidden_states)",
        ),
        "bias doubled": (
            "attn_weights = attn_weights + position_bias",
            "attn_weights = attn_weights + 2 * position_bias",
        ),
        "residual": (
            "hidden_states = hidden_states + self.dropout(forwarded_states)",
            "hidden_states = 0.9 * hidden_states + self.dropout(forwarded_states)",
        ),
        "norm left out": (
            "forwarded_states = self.layer_norm(hidden_states)",
            "forwarded_states = hidden_states + 0 * self.layer_norm(hidden_states)",
        ),
    },
    "t5gemma": {
        "embeddings scaled": (
            "self.config.hidden_size**0.5",
            "1.5 * self.config.hidden_size**0.5",
        ),
        "residual": (
            "hidden_states = residual + self.dropout(hidden_states)",
            "hidden_states = 0.98 * residual + self.dropout(hidden_states)",
        ),
    },
}
# between the embedding and the layers, where our stacks ask theirs (`fastvlm.run.embedded`)
ASKED = [
    ("bart", "positions from three"),
    ("t5gemma", "embeddings scaled"),
    ("whisper", "one position further"),
    ("m2m_100", "one position further"),
    ("marian", "one position further"),
]
CASES = [
    (family, plant)
    for family, plants in PLANTS.items()
    for plant in plants
    if (family, plant) not in ASKED
]


HEADS = {
    "scaled logits": (
        "bart",
        ("lm_logits = self.lm_head(outputs[0])", "lm_logits = 0.5 * self.lm_head(outputs[0])"),
    ),
    "a label counts in the row behind it": (
        "bart",
        (
            "loss_fct(lm_logits.view(-1, self.config.vocab_size), labels.view(-1))",
            "loss_fct(lm_logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())",
        ),
    ),
    "a label counts in the row before it": (
        "bart",
        (
            "loss_fct(lm_logits.view(-1, self.config.vocab_size), labels.view(-1))",
            "loss_fct(lm_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())",
        ),
    ),
    "softcap": ("gemma2", ("logits = torch.tanh(logits)", "logits = torch.tanh(1.1 * logits)")),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("plant", HEADS)
def test_other_heads_and_losses_give_their_own_numbers(plant: str, training: bool) -> None:
    family, edit = HEADS[plant]
    batch = FAMILIES[family].training(nn.Module())
    losses = []
    for patch in (False, True):
        model = trainer_copy.build(family, edit).train(training)
        if patch:
            fastvlm.patch(model)
        loss = model(**batch).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        losses.append((loss.detach(), torch.stack([grad.norm() for grad in grads])))
    (want, wanted), (got, given) = losses
    assert torch.allclose(got, want, rtol=1e-5, atol=0)
    assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["bart", "mbart", "whisper", "m2m_100", "marian", "gemma2", "t5gemma", "t5"]
)
def test_a_trainers_copy_is_patched_as_the_family_is(family: str) -> None:
    ours, theirs = trainer_copy.build(family), FAMILIES[family].build()
    report, known = fastvlm.patch(ours), fastvlm.patch(theirs)
    assert report.entries == known.entries
    assert not report.skipped


# seen without a trial: what an attention says of itself, its stack's masks do not
SAID = {"not causal": "its stack makes other masks", "window": "has another window"}


@pytest.mark.parametrize(("family", "plant"), CASES)
def test_what_computes_something_else_is_left_alone(family: str, plant: str) -> None:
    model = trainer_copy.build(family, PLANTS[family][plant])
    batch = FAMILIES[family].training(model)
    with torch.no_grad():
        expected = model(**batch).loss
        report = fastvlm.patch(model)
        assert torch.allclose(model(**batch).loss, expected, rtol=1e-5, atol=0)
    told = [e.reason for e in report.skipped if e.reason is not None]
    if plant in SAID:
        assert any(SAID[plant] in reason for reason in told), told
        return
    found = [reason for reason in told if "of its size apart" in reason and "not known" in reason]
    assert found or plant == "RMS norm without offset", told
    assert found or any("it computes neither" in reason for reason in told)


@pytest.mark.parametrize(("family", "plant"), ASKED)
def test_other_embeddings_are_patched_and_give_their_own_numbers(family: str, plant: str) -> None:
    model = trainer_copy.build(family, PLANTS[family][plant]).eval()
    batch = FAMILIES[family].training(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = model(**batch).loss
    tokens = model.generate(**inputs, num_beams=2, max_new_tokens=8)
    assert not fastvlm.patch(model).skipped
    assert torch.allclose(model(**batch).loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(model.generate(**inputs, num_beams=2, max_new_tokens=8), tokens)


def test_the_size_of_a_difference_is_told() -> None:
    assert probe.difference_of([torch.ones(3)], [torch.ones(3)]) is None
    told = probe.difference_of([torch.full((3,), 2.0)], [torch.tensor([2.0, 2.0, 1.5])])
    assert told is not None
    assert "0.2 " in told
    assert probe.difference_of([torch.ones(3)], [torch.ones(2)]) is not None
    broken = torch.tensor([1.0, float("nan"), 1.0])
    assert probe.difference_of([torch.ones(3)], [broken]) is not None
    assert probe.difference_of([broken], [broken]) is not None


def test_a_trial_leaves_no_trace() -> None:
    model = trainer_copy.build("bart").train()
    fired: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    fastvlm.patch(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not fired
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_here_cannot_be_tried() -> None:
    model = trainer_copy.build("bart").to("meta")
    with pytest.raises(fastvlm.PatchError, match="meta device"):
        fastvlm.patch(model, strict=True)
    known = models.bart().to("meta")
    assert not fastvlm.patch(known).skipped


def test_a_subclass_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bart.modeling_bart import BartDecoderLayer

    class Doubled(BartDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    model = models.bart()
    layer = model.model.decoder.layers[1]
    layer.__class__ = Doubled
    batch = models.FAMILIES["bart"].training(model)
    with torch.no_grad():
        expected = model(**batch).loss
        fastvlm.patch(model)
        assert not is_patched(layer)
        assert torch.allclose(model(**batch).loss, expected, rtol=1e-5, atol=0)


def test_an_untested_version_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []
    run = trials.answers
    monkeypatch.setattr(trials, "answers", lambda stack: tried.append(stack) or run(stack))
    monkeypatch.setattr(probe, "is_tested", lambda package: False)
    assert not fastvlm.patch(models.bart()).skipped
    assert tried


@pytest.mark.slow
def test_a_trial_of_a_real_layer_is_short() -> None:
    """Of the width of Florence-2-large: under a second, at the memory of a few layers."""
    wide = {"d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
    model = trainer_copy.build(
        "bart", **wide, encoder_attention_heads=16, decoder_attention_heads=16
    )
    start = time.process_time()
    assert not fastvlm.patch(model).skipped
    assert time.process_time() - start < 10  # a bound for busy machines; it takes under a second
