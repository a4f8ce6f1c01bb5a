"""Hooks on the parts of a patched model see and change what they would without fastvlm."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import FAMILIES
from sameness import assert_the_same, numbers
from test_families import generate
from torch import Tensor, nn

import fastvlm


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["bart", "gemma2", "t5gemma", "florenz"])
def test_a_hook_gets_the_attention_probabilities(name: str, when: str) -> None:
    """Of eager attention; without fastvlm's layouts in its keyword arguments."""
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    batch = FAMILIES[name].training(model)

    def seen() -> list[Tensor]:
        found: list[Tensor] = []

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            assert "fastvlm_layouts" not in kwargs
            found.append(output[1].detach())

        attention = model.get_decoder().layers[0].self_attn
        handle = attention.register_forward_hook(hook, with_kwargs=True)
        if when == "before":
            fastvlm.patch(model)
        with torch.no_grad():
            model(**batch)
        handle.remove()
        return found

    if when == "after":
        fastvlm.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = seen()
    fastvlm.unpatch(model)
    handle_free = seen() if when == "after" else got
    assert len(got) == len(handle_free) == 1
    assert torch.allclose(got[0], handle_free[0], atol=1e-5)


def scale_by_length(module: Any, args: Any, output: Any) -> Any:
    """What noise as of NEFTune does: its size is that of the padded batch's rows."""
    states = output[0] if isinstance(output, tuple) else output
    states = states * (1 + 3 / states.shape[1]) + states.mean(1, keepdim=True)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def named(model: Any, *names: str) -> nn.Module:
    """The first part of the decoder's second layer whose name ends in one of these."""
    parts = model.get_decoder().layers[1].named_modules()
    return next(part for name, part in parts if name.endswith(names))


PARTS = {
    "embedding": lambda m: m.get_decoder().embed_tokens,
    "layer": lambda m: m.get_decoder().layers[0],
    "mlp": lambda m: named(m, "mlp", "fc1"),
    "norm": lambda m: named(m, "norm"),
    "query": lambda m: m.get_decoder().layers[0].self_attn.q_proj,
    "activation": lambda m: named(m, "act_fn", "activation_fn"),
    "encoder": lambda m: m.get_encoder().layers[0],
    "encoder-keys": lambda m: m.get_encoder().layers[1].self_attn.k_proj,
}


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in ("bart", "t5gemma") for part in PARTS]
    + [("mbart", "layer"), ("mbart", "activation"), ("gemma2", "embedding"), ("gemma2", "mlp")]
    + [("florenz", "norm"), ("florenz", "query"), ("florence2", "encoder")],
)
def test_a_hook_sees_what_it_would_see(name: str, part: str) -> None:
    model = FAMILIES[name].build()
    batch, inputs = FAMILIES[name].training(model), FAMILIES[name].inputs(model)
    usual, _ = numbers(model, batch)
    PARTS[part](model).register_forward_hook(scale_by_length)
    want, tokens = numbers(model, batch), generate(model.eval(), inputs, num_beams=3)
    assert not torch.allclose(want[0], usual, rtol=1e-6)
    fastvlm.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_the_same(numbers(model, batch), want)
        assert torch.equal(generate(model.eval(), inputs, num_beams=3), tokens)


@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_hook_that_comes_later_is_seen_and_told_once(name: str) -> None:
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    fastvlm.patch(model)
    usual = numbers(model, batch)
    part = PARTS["layer"](model)
    handle = part.register_forward_hook(scale_by_length)
    with pytest.warns(UserWarning, match=r"hook on layers\.0 \(scale_by_length\)"):
        got = numbers(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(model, batch)
    handle.remove()
    assert_the_same(numbers(model, batch), usual)
    part.register_forward_hook(scale_by_length)
    fastvlm.unpatch(model)
    assert_the_same(got, numbers(model, batch))


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_harmless_hooks_keep_packing(name: str) -> None:
    import peft

    model = FAMILIES[name].build()
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fastvlm.patch(model)
    with torch.no_grad():  # leaves transformers' hooks behind
        model(**FAMILIES[name].training(model), output_hidden_states=True)
    widths: list[int] = []
    layer = model.get_base_model().get_decoder().layers[0]
    run = type(layer.self_attn).forward

    def spy(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(hidden_states.shape[0])
        return run(self, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(type(layer.self_attn), "forward", spy)
        numbers(model, FAMILIES[name].training(model))
    assert set(widths) == {1}  # [1, tokens, d]
