"""GPT-2, behind an encoder and alone: what is its own. The rest is in test_families.py."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers as tf
from models import PAD, RELATIVES, VOCAB, _gpt2, _spread, gpt2, vit_gpt2
from packaging.version import Version
from sameness import assert_adapted_is_the_same, assert_the_same, assert_writes_the_same, numbers
from test_families import generate
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import fastvlm
from fastvlm.compat import hf

OPS = {"self_attention", "cross_attention", "cached_attention", "gelu_mlp", "linear_topk"}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "unscaled": {"scale_attn_weights": False},
    "by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "relu": {"activation_function": "relu"},
    "unknown": {"activation_function": "quick_gelu"},
}


def inputs_of(name: str) -> dict[str, Tensor]:
    return RELATIVES[name].inputs(nn.Module())


def batch_of(name: str) -> dict[str, Tensor]:
    return RELATIVES[name].training(nn.Module())


def conv1ds(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "Conv1D"]


@pytest.mark.parametrize("name", ["vit_gpt2", "gpt2"])
def test_all_of_it_is_patched_and_nothing_else_changes(name: str) -> None:
    model = RELATIVES[name].build()
    before = {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    names = list(model.state_dict())
    report = fastvlm.patch(model, strict=True)
    found = {op for entry in report.patched for op in entry.ops}
    assert found >= (OPS if name == "vit_gpt2" else OPS - {"cross_attention"})
    generate(model, inputs_of(name), num_beams=2)
    numbers(model, batch_of(name))
    assert {n: (id(p), p.data_ptr(), p.shape) for n, p in model.named_parameters()} == before
    assert list(model.state_dict()) == names
    kinds = {type(m) for m in RELATIVES[name].build().modules()}
    fastvlm.unpatch(model)
    assert {type(m) for m in model.modules()} == kinds


@pytest.mark.parametrize("name", ["vit_gpt2", "gpt2"])
def test_the_same_tokens_by_a_step_that_is_written_down(name: str, steps: list[Any]) -> None:
    model, inputs = RELATIVES[name].build(), inputs_of(name)
    assert_writes_the_same(model, inputs, CASES, steps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_its_configuration(variant: str) -> None:
    model = vit_gpt2(**VARIANTS[variant])
    inputs, batch = inputs_of("vit_gpt2"), batch_of("vit_gpt2")
    expected = [generate(model, inputs, num_beams=n) for n in (1, 3)]
    want = numbers(copy.deepcopy(model), batch)
    report = fastvlm.patch(model)
    assert [e.kind for e in report.skipped] == (["GPT2MLP"] * 2 if variant == "unknown" else [])
    for n, tokens in zip((1, 3), expected):
        assert torch.equal(generate(model.eval(), inputs, num_beams=n), tokens)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("only", [("attention",), ("mlp", "norm"), ("loss", "linear", "mlp")])
@pytest.mark.parametrize("name", ["vit_gpt2", "gpt2"])
def test_parts_of_it_alone(name: str, only: tuple[str, ...]) -> None:
    model, inputs = RELATIVES[name].build(), inputs_of(name)
    expected = generate(model, inputs, num_beams=2)
    want = numbers(copy.deepcopy(model), batch_of(name))
    fastvlm.patch(model, only=only)
    assert torch.equal(generate(model.eval(), inputs, num_beams=2), expected)
    assert_the_same(numbers(model, batch_of(name)), want)


def test_training_with_each_kind_of_checkpoint_and_dropout() -> None:
    model, batch = vit_gpt2(), batch_of("vit_gpt2")
    want = numbers(model, batch)
    fastvlm.patch(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_the_same(numbers(model, batch), want)
    model.gradient_checkpointing_disable()
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
            torch.manual_seed(3)
            assert not torch.equal(numbers(model, batch)[0], want[0]), name
            module.p = 0.0


def _logits(model: Any, write: Any) -> list[Tensor]:
    """Of a prefill and three steps, weights changed between them."""
    found, past = [], None
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for new in ([[2, 7], [2, 8]], [[9], [10]], [[11], [12]], [[3], [4]]):
            out = model(
                torch.tensor(new), encoder_hidden_states=states, past_key_values=past,
                use_cache=True,
            )  # fmt: skip
            past = out.past_key_values
            found.append(out.logits[:, -1])
            write(model)
    return found


def _in_place(model: nn.Module) -> None:
    for layer in conv1ds(model):
        layer.weight.mul_(1.1)


def _exchanged(model: nn.Module) -> None:
    for layer in conv1ds(model):
        layer.weight.data = layer.weight.data * 1.1
        layer.bias.data = layer.bias.data + 0.1


def _an_optimizer(model: nn.Module) -> None:
    weights = [layer.weight for layer in conv1ds(model)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.05).step()


@pytest.mark.parametrize("write", [_in_place, _exchanged, _an_optimizer])
def test_changed_weights_are_seen_by_the_next_step(write: Any) -> None:
    plain = vit_gpt2().decoder
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    still = _logits(copy.deepcopy(plain), lambda model: None)
    for got, want in zip(_logits(ours, write), _logits(plain, write)):
        assert torch.allclose(got, want, atol=2e-4)
    assert not torch.allclose(still[2], want, atol=1e-2)


@pytest.mark.parametrize("when", ["before", "behind"])
def test_lora_is_called_not_bypassed(when: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "q_attn", "c_proj", "c_fc"], init_lora_weights=False,
        fan_in_fan_out=True,
    )  # fmt: skip
    inputs, batch = inputs_of("vit_gpt2"), batch_of("vit_gpt2")

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    model = assert_adapted_is_the_same(vit_gpt2, adapted, inputs, batch, when)
    expected = generate(model.eval(), inputs, num_beams=3)
    model.merge_adapter()
    assert torch.equal(generate(model.eval(), inputs, num_beams=3), expected)


def test_beams_read_one_copy_of_a_picture() -> None:
    model = vit_gpt2()
    fastvlm.patch(model)
    out = generate(model, inputs_of("vit_gpt2"), num_beams=4, return_dict_in_generate=True)
    for layer in out.past_key_values.cross_attention_cache.layers:
        keys, values = layer.packed
        assert keys.shape == (3 * 5, 4, 8)  # three pictures of five tokens, heads of eight
        assert keys.is_contiguous()
        assert values.is_contiguous()


def test_a_hook_on_a_product_is_called() -> None:
    model, inputs = vit_gpt2(), inputs_of("vit_gpt2")
    expected = generate(model, inputs, num_beams=2)
    fastvlm.patch(model)
    seen: list[tuple[int, ...]] = []
    block = model.decoder.transformer.h[1]
    for part in (block.attn.c_attn, block.mlp.c_fc, block.mlp.dropout, block.attn.resid_dropout):
        handle = part.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
        assert torch.equal(generate(model, inputs, num_beams=2), expected)
        assert len(seen) == 12
        assert seen[-1][:2] == (6, 1)
        seen.clear()
        handle.remove()


def test_a_layer_whose_class_is_put_back_is_seen() -> None:
    """transformers' own layer hands nothing on to its cross-attention."""
    model, batch = vit_gpt2(), batch_of("vit_gpt2")
    want = numbers(copy.deepcopy(model), batch)
    fastvlm.patch(model)
    model.decoder.transformer.h[1].__class__ = GPT2Block
    with pytest.warns(UserWarning, match="hands only to layers of fastvlm"):
        assert_the_same(numbers(model, batch), want)


def padded() -> dict[str, Tensor]:
    """Rows padded in front, that read padded states."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


def test_a_decoder_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """With an encoder's states and without; told positions; with token types; nothing is said of a
    mask that was given."""
    plain = vit_gpt2().decoder
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = padded()
    with caplog.at_level(logging.WARNING):
        assert_the_same(numbers(ours, batch), numbers(plain, batch))
    assert "attention_mask" not in caplog.text
    ids, types = batch["input_ids"][1:], torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    places = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    states = {"encoder_hidden_states": batch["encoder_hidden_states"][1:]}
    for read in ({}, states):
        for more in ({}, {"token_type_ids": types}, {"position_ids": places}):
            found = []
            for model in (ours.eval(), plain.eval()):
                with torch.no_grad():
                    cut = [
                        {n: v[:, i:j] for n, v in more.items()} for i, j in ((0, 5), (5, 6), (6, 7))
                    ]
                    first = model(ids[:, :5], use_cache=True, **read, **cut[0])
                    past = first.past_key_values
                    second = model(ids[:, 5:6], past_key_values=past, **read, **cut[1])
                    third = model(ids[:, 6:7], past_key_values=past, **read, **cut[2])
                found.append(torch.cat([first.logits, second.logits, third.logits], 1))
            assert torch.allclose(*found, atol=1e-4), (list(read), list(more))


def test_states_that_nothing_reads_are_refused_as_ever() -> None:
    model = gpt2()
    fastvlm.patch(model)
    with pytest.raises(ValueError, match="cross-attention layers"):
        model(torch.tensor([[5, 6]]), encoder_hidden_states=torch.randn(1, 4, 32))


def test_its_other_heads() -> None:
    """Two heads over choices of texts, and a class of a text by its last token."""
    generator = torch.Generator().manual_seed(2)
    choices = torch.randint(3, VOCAB, (2, 3, 6), generator=generator)
    last = torch.tensor([[5, 4, 5], [3, 5, 5]])
    double = {
        "input_ids": choices, "mc_token_ids": last, "mc_labels": torch.tensor([1, 0]),
        "labels": choices,
    }  # fmt: skip
    classes = {**batch_of("gpt2"), "labels": torch.tensor([1, 0, 1])}
    kinds: list[tuple[Any, dict[str, Tensor], dict[str, Any]]] = [
        (tf.GPT2DoubleHeadsModel, double, {"summary_first_dropout": 0.0}),
        (tf.GPT2ForSequenceClassification, classes, {"num_labels": 2}),
    ]
    for kind, batch, settings in kinds:
        torch.manual_seed(0)
        model = _spread(kind(_gpt2(**settings)), 0.15)
        found = []
        for each in (model, copy.deepcopy(model)):
            if each is not model:
                fastvlm.patch(each)
            out = each(**batch)
            losses = [out[n] for n in ("loss", "mc_loss") if out.get(n) is not None]
            torch.stack(losses).sum().backward()
            grads = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
            found.append((torch.stack(losses).detach(), torch.cat(grads)))
        assert_the_same(found[1], found[0])


def test_a_copy_of_it_in_another_model() -> None:
    """A decision transformer's, with one token, so that only its MLPs can be tried."""
    torch.manual_seed(0)
    config = tf.DecisionTransformerConfig(
        state_dim=5, act_dim=3, hidden_size=32, max_ep_len=20, n_layer=2, n_head=4, n_inner=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = _spread(tf.DecisionTransformerModel(config), 0.15)
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = {
        name: torch.randn(2, 6, width, generator=generator)
        for name, width in (("states", 5), ("actions", 3), ("rewards", 1), ("returns_to_go", 1))
    }
    batch["timesteps"] = torch.arange(6).expand(2, 6)
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    seen = batch["attention_mask"] == 1
    found = []
    for each in (model, copy.deepcopy(model)):
        if each is not model:
            report = fastvlm.patch(each)
            assert "gelu_mlp" in {op for entry in report.patched for op in entry.ops}
        out = each(**batch)
        values = torch.cat([out[n][seen].flatten() for n in ("action_preds", "state_preds")])
        values.square().sum().backward()
        grads = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
        found.append((values.detach(), torch.cat(grads)))
    assert torch.allclose(found[1][0], found[0][0], atol=1e-4)
    assert torch.allclose(found[1][1], found[0][1], atol=1e-3 * found[0][1].abs().max().item())


def test_a_class_that_only_looks_like_it_is_tried_first() -> None:
    class Mine(GPT2Block):
        more = 0.0

        @hf.takes_cache
        def forward(
            self,
            hidden_states: Tensor,
            past_key_values: Any = None,
            attention_mask: Any = None,
            encoder_hidden_states: Any = None,
            encoder_attention_mask: Any = None,
            use_cache: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            given = past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask
            out = super().forward(hidden_states, *given, use_cache, **kwargs)
            return out + self.more * hidden_states if self.more else out

    class Other(Mine):
        more = 0.01
        forward = Mine.forward

    for cls, same in ((Other, False), (Mine, True)):
        model = vit_gpt2()
        for block in model.decoder.transformer.h:
            block.__class__ = cls
        expected = generate(model, inputs_of("vit_gpt2"))
        report = fastvlm.patch(model)
        assert bool(report.skipped) != same
        assert same or any("computes something else" in str(e.reason) for e in report.skipped)
        assert torch.equal(generate(model, inputs_of("vit_gpt2")), expected)


if Version(tf.__version__) < Version("5.10"):  # older ones fail with a static cache
    del CASES["static"]
