"""Pix2Struct: a stack with its own head and loss, which hands its layers what they know alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import trainer_copy
from models import PAD, _pad, _spread, _tokens
from packaging.version import Version
from pix2struct_models import PATCHES, pix2struct, pix2struct_inputs
from sameness import assert_the_same, assert_writes_the_same, numbers
from test_families import generate
from test_loss_without_logits import Calls
from torch import Tensor, nn
from transformers import __version__

import fastvlm

if Version(__version__) < Version("5.17"):
    pytest.skip("its attention is left alone there", allow_module_level=True)

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "long": {"num_beams": 2, "max_new_tokens": 24, "min_new_tokens": 24},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "early": {"num_beams": 3, "early_stopping": True, "min_new_tokens": 2, "max_new_tokens": 20},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}


def inputs() -> dict[str, Tensor]:
    return pix2struct_inputs(nn.Module())


def training(length: int = 14) -> dict[str, Tensor]:
    """Labels longer than distances are told apart, of three lengths."""
    labels, mask = _pad(_tokens(3, length, 5), [length, 3, 9], left=False)
    return {**inputs(), "labels": labels.masked_fill(mask == 0, -100)}


def given(batch: dict[str, Tensor], left: bool = False) -> dict[str, Tensor]:
    """The same with the decoder's tokens and their mask brought by the caller."""
    ids, mask = _pad(_tokens(3, 14, 5), [14, 3, 9], left)
    labels = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, -100)
    labels[:, -1] = -100
    labels = labels.masked_fill(mask == 0, -100)
    return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels}


def counted_padding() -> dict[str, Tensor]:
    """As of tokenizer(padding=True): padding counts, in rows that the mask hides."""
    batch = training()
    return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, PAD)}


def holes() -> dict[str, Tensor]:
    batch = given(training())
    batch["decoder_attention_mask"][:, 4:6] = 0
    return batch


BATCHES: dict[str, Any] = {
    "labels": training,
    "padding counts": counted_padding,
    "given": lambda: given(training()),
    "given, left": lambda: given(training(), left=True),
    "holes": holes,
    "no labels in a row": lambda: {
        **training(), "labels": training()["labels"].index_fill(0, torch.tensor([1]), -100)
    },
    "no mask of patches": lambda: {n: v for n, v in training().items() if n != "attention_mask"},
}  # fmt: skip


def test_all_of_it_is_patched() -> None:
    report = fastvlm.patch(pix2struct(), strict=True)
    of = {entry.module: set(entry.ops) for entry in report.patched}
    found = set().union(*of.values())
    assert found >= {"self_attention", "cross_attention", "cached_attention", "geglu_mlp"}
    assert of["decoder.lm_head"] == {"linear", "linear_cross_entropy", "linear_topk"}
    assert of["encoder.encoder.layer.1.mlp"] == {"geglu_mlp"}
    assert of["encoder.layernorm"] == {"rms_norm"}
    assert of["encoder.encoder.layer.0.attention.query"] == {"linear"}
    assert "encoder.encoder.layer.0.attention" not in of


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_tokens_by_a_step_that_is_written_down(tied: bool, steps: list[Any]) -> None:
    assert_writes_the_same(pix2struct(tied), inputs(), CASES, steps)


def test_texts_that_are_begun() -> None:
    """By prompts of one length, or padded; with patches whose mask is not given."""
    model = pix2struct()
    begun = [{"decoder_input_ids": _tokens(3, 4)}]
    for left in (True, False):
        ids, mask = _pad(_tokens(3, 6), [6, 3, 4], left)
        begun.append({"decoder_input_ids": ids, "decoder_attention_mask": mask})
    calls: list[Any] = [*begun, {}]
    unmasked = {"flattened_patches": inputs()["flattened_patches"]}
    batches = [{**inputs(), **call} for call in calls] + [unmasked]
    expected = [generate(model, batch, num_beams=n) for batch in batches for n in (1, 2)]
    fastvlm.patch(model)
    got = [generate(model, batch, num_beams=n) for batch in batches for n in (1, 2)]
    assert all(map(torch.equal, got, expected))


def test_keys_of_a_picture_are_held_once() -> None:
    model = pix2struct()
    ask = {"num_beams": 4, "return_dict_in_generate": True}
    plain = generate(model, inputs(), **ask).past_key_values.cross_attention_cache
    fastvlm.patch(model)
    shared = generate(model, inputs(), **ask).past_key_values.cross_attention_cache
    seen = inputs()["attention_mask"].bool()
    assert shared.layers[0].packed[0].shape[0] == int(seen.sum())
    seen = seen.repeat_interleave(4, 0)
    for theirs, ours in zip(plain.layers, shared.layers):
        got, want = (layer.keys.transpose(1, 2)[seen] for layer in (ours, theirs))
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_training_in_both_forms_of_checkpoints_and_without(name: str) -> None:
    """Its parts checkpoint; the model itself says that it does not."""
    model: Any = pix2struct(tie_word_embeddings=name == "given")
    batch = BATCHES[name]
    want = numbers(model, batch())
    fastvlm.patch(model)
    assert_the_same(numbers(model, batch()), want)
    for reentrant in (False, True):
        for part in (model.decoder, model.encoder):
            part.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_the_same(numbers(model, batch()), want)


@pytest.mark.parametrize("name", BATCHES)
def test_evaluation(name: str) -> None:
    """Loss, logits and cache; where a mask hides a row that nobody counts, logits are zero (with
    padding in front, somebody may predict the first token of a text from there)."""
    plain = pix2struct()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = BATCHES[name]()
    hidden = batch.get("decoder_attention_mask")
    with torch.no_grad():
        want, got = (model(**copy.deepcopy(batch), use_cache=True) for model in (plain, ours))
    assert torch.allclose(got.loss, want.loss, rtol=1e-5)
    counted = batch["labels"] != -100
    assert torch.allclose(got.logits[counted], want.logits[counted], atol=1e-4)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    if name == "given":
        assert (got.logits[hidden == 0] == 0).all()
        assert (want.logits[hidden == 0] != 0).any()


def test_training_runs_on_the_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text's; pictures keep their padding. No logits are made for the loss."""
    model = pix2struct().train()
    fastvlm.patch(model)
    calls = Calls(monkeypatch, "geglu_mlp", "linear_cross_entropy")
    out = model(**training())
    out.loss.backward()
    # as many as there are labels: each reads the one before it
    tokens = int((training()["labels"] != -100).sum())
    assert set(calls.rows["geglu_mlp"]) == {3 * PATCHES, tokens}
    assert len(calls.rows["linear_cross_entropy"]) == 1
    assert out.logits.shape == (3, 14, 99)
    assert (out.logits[training()["labels"] == -100] == 0).all()


def test_a_call_without_labels_computes_what_is_hidden() -> None:
    plain = pix2struct()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = {n: v for n, v in given(training(), left=True).items() if n != "labels"}
    for train in (False, True):
        want, got = (model.train(train)(**batch).logits for model in (plain, ours))
        assert torch.allclose(got, want, atol=1e-4)


def shared_batch() -> dict[str, Tensor]:
    batch = training()
    index = torch.tensor([2, 0, 0, 1, 2])
    rows = torch.tensor([0, 1, 2, 0, 1])
    return {**batch, "labels": batch["labels"][rows], "prompt_of_target": index}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("labelled", [True, False])
def test_many_texts_of_a_picture(eager: bool, labelled: bool) -> None:
    plain = pix2struct()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = shared_batch()
    repeated = {n: v for n, v in batch.items() if n != "prompt_of_target"}
    for name in ("flattened_patches", "attention_mask"):
        repeated[name] = batch[name][batch["prompt_of_target"]]
    if eager:
        plain.set_attn_implementation("eager")
        ours.set_attn_implementation("eager")
        batch["output_attentions"] = True  # type: ignore[assignment]
    if labelled:
        assert_the_same(numbers(ours, batch), numbers(plain, repeated))
        return
    for each in (batch, repeated):
        each["decoder_input_ids"] = each.pop("labels").clamp_min(PAD)
    with torch.no_grad():
        assert torch.allclose(ours(**batch).logits, plain(**repeated).logits, atol=1e-4)


def test_who_reads_which_picture_is_never_left_out() -> None:
    """Its model hands no such argument on: where nobody else can, the call is refused."""
    model = pix2struct()
    fastvlm.patch(model, only=("mlp", "norm", "linear", "loss"))
    with pytest.raises(ValueError, match="prompt_of_target must be left out: its decoder"):
        model(**shared_batch())
    fastvlm.patch(model)
    model.decoder.forward = torch.compile(model.decoder.forward, backend="eager")
    batch = {**training(), "prompt_of_target": torch.tensor([2, 0, 1])}
    with pytest.raises(ValueError, match="prompt_of_target must be left out: it did not reach"):
        model(**batch)


@pytest.mark.parametrize("only", [("attention",), ("attention", "norm"), ("mlp", "norm"), "loss"])
def test_parts_of_it_alone(only: Any) -> None:
    model = pix2struct()
    expected = [generate(model, inputs(), num_beams=n) for n in (1, 3)]
    want = numbers(model, training())
    fastvlm.patch(model.eval(), only=only)
    got = [generate(model, inputs(), num_beams=n) for n in (1, 3)]
    assert all(map(torch.equal, got, expected))
    assert_the_same(numbers(model, training()), want)


def test_a_text_model_by_itself() -> None:
    """It has a head, labels and a loss, and no generate()."""
    plain: Any = pix2struct().decoder
    ours = copy.deepcopy(plain)
    report = fastvlm.patch(ours, strict=True)
    assert {e.module: e.ops for e in report.patched}["lm_head"] == ("linear",)
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    ids, mask = _pad(_tokens(3, 8), [8, 3, 5], left=False)
    batch = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": states}
    labels = ids.masked_fill(mask == 0, -100)
    seen = mask == 1
    for train in (False, True):
        want, got = (m.train(train)(**batch, labels=labels) for m in (plain, ours))
        assert torch.allclose(got.loss, want.loss, rtol=1e-5)
        assert torch.allclose(got.logits[seen], want.logits[seen], atol=1e-4)
        want, got = (m(**batch, return_dict=False)[0] for m in (plain, ours))
        assert torch.allclose(got, want, atol=1e-4)
    del batch["attention_mask"], batch["encoder_hidden_states"]  # it reads itself alone
    for model in (plain, ours):
        model.config.is_decoder = False
    with torch.no_grad():
        want, got = (m(**batch).logits for m in (plain, ours))
    assert torch.allclose(got, want, atol=1e-4)


PARTS = ("lm_head", "final_layer_norm", "layer.0.self_attention", "layer.1.mlp.DenseReluDense.act")


@pytest.mark.parametrize("path", PARTS)
def test_who_looks_at_a_part_sees_what_is_there(path: str) -> None:
    model: Any = pix2struct()
    expected, want = generate(model, inputs(), num_beams=2), numbers(model, training())
    shapes: list[list[tuple[int, ...]]] = []
    for first in (lambda: None, lambda: fastvlm.patch(model)):
        first()
        shapes.append([])
        part = model.decoder.get_submodule(path)
        hook = part.register_forward_hook(
            lambda module, args, out: shapes[-1].append(tuple(args[0].shape))
        )
        assert torch.equal(generate(model.eval(), inputs(), num_beams=2), expected)
        assert_the_same(numbers(model, training()), want)
        hook.remove()
    assert shapes[0] == shapes[1]


def test_a_hook_on_the_head_keeps_nothing_from_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the padded grid, zeros at padding, of layers that ran without."""
    model: Any = pix2struct().train()
    fastvlm.patch(model)
    seen: list[Tensor] = []
    model.decoder.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    calls = Calls(monkeypatch, "geglu_mlp")
    labels = training()["labels"]
    model(**training()).loss.backward()
    assert int((labels != -100).sum()) in calls.rows["geglu_mlp"]
    assert torch.equal((seen[0] != 0).any(-1), labels != -100)


def test_a_head_that_is_exchanged() -> None:
    """Before or behind a patch: it is called."""

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    model: Any = pix2struct()
    head = Half(32, 99, bias=False)
    plain = copy.deepcopy(model)
    plain.decoder.lm_head = head
    expected, want = generate(plain, inputs(), num_beams=2), numbers(plain, training())
    for before in (True, False):
        ours = copy.deepcopy(model)
        if not before:
            fastvlm.patch(ours)
        ours.decoder.lm_head = copy.deepcopy(head)
        if before:
            fastvlm.patch(ours)
        assert torch.equal(generate(ours.eval(), inputs(), num_beams=2), expected)
        assert_the_same(numbers(ours, training()), want)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weights_in_fewer_bits(weights: str) -> None:
    model = pix2struct()
    report = fastvlm.patch(model, weights=weights, strict=True)
    of = {entry.module: entry.ops for entry in report.patched}
    layer = "decoder.layer.0."
    for part, op in (("self", "low_precision_linear"), ("encoder_decoder", "linear")):
        assert of[f"{layer}{part}_attention.attention.key"] == (op,)
    assert of["decoder.lm_head"][0] == "low_precision_linear"
    assert generate(model, inputs(), num_beams=2).shape == (3, 13)


def test_unpatched_again() -> None:
    model = pix2struct()
    classes = [type(m) for m in model.modules()]
    expected = generate(model, inputs(), num_beams=2)
    fastvlm.patch(model)
    assert torch.equal(generate(copy.deepcopy(model), inputs(), num_beams=2), expected)
    fastvlm.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(generate(model, inputs(), num_beams=2), expected)


# a scale is read where it stands
PLANTS = {
    "scale": ("self.scaling = 1.0", "self.scaling = 1.01"),
    "residual": ("hidden_states + self.dropout(forwarded_states)",
                 "hidden_states + 0.9 * self.dropout(forwarded_states)"),
    "before the head": ("logits = self.lm_head(hidden_states)",
                        "logits = self.lm_head(0.9 * hidden_states)"),
    "behind the head": ("logits = self.lm_head(hidden_states)",
                        "logits = 0.9 * self.lm_head(hidden_states)"),
    "the mask of the picture": ("encoder_attention_mask,\n                encoder_decoder_pos",
                                "None,\n                encoder_decoder_pos"),
    "the bias of the first layer": ("position_bias = layer_outputs[1]", "position_bias = None"),
}  # fmt: skip


@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_a_trainers_copy(plant: str | None) -> None:
    edits = () if plant is None else (PLANTS[plant],)
    module = trainer_copy.module_of("pix2struct", *edits)
    config = pix2struct().config
    torch.manual_seed(0)
    model: nn.Module = _spread(module.Pix2StructForConditionalGeneration(config), 0.15)
    expected = generate(model, inputs(), num_beams=2)
    want = [numbers(model, batch()) for batch in (training, counted_padding)]
    report = fastvlm.patch(model.eval())
    assert torch.equal(generate(model, inputs(), num_beams=2), expected)
    for got, batch in zip(want, (training, counted_padding)):
        assert_the_same(numbers(model, batch()), got)
    told = [str(e.reason) for e in report.skipped]
    differs = any("of its size apart" in reason for reason in told)
    assert differs == (plant not in (None, "scale")), told


def test_attention_that_does_not_say_it_is_causal() -> None:
    model: Any = pix2struct()
    for block in model.decoder.layer:
        block.self_attention.attention.is_causal = False
    want = numbers(model, training())
    report = fastvlm.patch(model)
    assert any("does not say" in str(entry.reason) for entry in report.skipped)
    assert_the_same(numbers(model, training()), want)


def test_heads_of_another_width_than_its_rows() -> None:
    model = pix2struct(num_heads=2)
    report = fastvlm.patch(model)
    assert any("are not of 2 heads of 8" in str(entry.reason) for entry in report.skipped)
    assert "decoder" in {entry.module for entry in report.skipped}


def test_a_compiled_stack_trains_the_same() -> None:
    model = pix2struct()
    want = numbers(model, training())
    fastvlm.patch(model)
    model.decoder.forward = torch.compile(model.decoder.forward, backend="eager")
    assert_the_same(numbers(model, training()), want)
