"""Forwards that stand on an instance: Accelerate's, a user's own."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from models import FAMILIES
from sameness import assert_the_same, numbers
from test_families import generate

import fastvlm
from fastvlm.patching.patch import PatchError, is_patched


def on_decoder(model: Any) -> None:
    add_hook_to_module(model.get_decoder(), AlignDevicesHook())


def on_every_part(model: Any) -> None:
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook())


def on_and_off(model: Any) -> None:
    on_every_part(model)
    remove_hook_from_module(model, recurse=True)


HOOKS: dict[str, Callable[[Any], None]] = {
    "decoder": on_decoder, "every-part": on_every_part, "on-and-off": on_and_off
}  # fmt: skip


@pytest.mark.parametrize("order", ["hook patch", "patch hook"])
@pytest.mark.parametrize(
    ("name", "hook"),
    [("bart", "decoder"), ("bart", "every-part"), ("bart", "on-and-off"), ("gemma2", "decoder"),
     ("t5gemma", "every-part"), ("florenz", "on-and-off")],
)  # fmt: skip
def test_hooks_of_accelerate(name: str, hook: str, order: str) -> None:
    model = FAMILIES[name].build()
    batch, inputs = FAMILIES[name].training(model), FAMILIES[name].inputs(model)
    want, tokens = numbers(model, batch), generate(model.eval(), inputs, num_beams=3)
    for act in order.split():
        if act == "hook":
            HOOKS[hook](model)
        else:
            fastvlm.patch(model)
    assert is_patched(model.get_decoder())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are harmless: nothing is given up
        assert_the_same(numbers(model, batch), want)
    assert torch.equal(generate(model.eval(), inputs, num_beams=3), tokens)
    fastvlm.unpatch(model)
    assert not any(is_patched(m) for m in model.modules())
    assert_the_same(numbers(model, batch), want)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(generate(model.eval(), inputs, num_beams=3), tokens)


@pytest.mark.parametrize("order", ["offload patch", "patch offload"])
@pytest.mark.parametrize("name", ["gemma2", "bart", "florenz"])
def test_a_model_that_is_offloaded(name: str, order: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    tokens = generate(model, inputs, num_beams=3)
    for act in order.split():
        if act == "offload":
            accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=False)
        else:
            fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), tokens)
    fastvlm.unpatch(model)
    assert torch.equal(generate(model, inputs, num_beams=3), tokens)


class Halving(ModelHook):
    """A user's: it changes what goes in."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        assert "fastvlm_layouts" not in kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] / 2}
        return (args[0] / 2, *args[1:]), kwargs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_a_hook_of_the_users_through_accelerate(name: str, when: str) -> None:
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    ours = copy.deepcopy(model)
    if when == "after":
        fastvlm.patch(ours)
    for each in (model, ours):
        add_hook_to_module(each.get_decoder().layers[1].self_attn, Halving())
    if when == "before":
        report = fastvlm.patch(ours)
        assert any("a forward of its own" in str(e.reason) for e in report.skipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_the_same(numbers(ours, batch), numbers(model, batch))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["stack", "layer", "attention"])
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_forward_of_the_users(name: str, part: str, when: str) -> None:
    model = FAMILIES[name].build()
    batch, inputs = FAMILIES[name].training(model), FAMILIES[name].inputs(model)

    def give_own_forward(model: Any) -> None:
        stack = model.get_decoder()
        layer = stack.layers[0]
        at = {"stack": stack, "layer": layer, "attention": layer.self_attn}[part]
        forward = at.forward

        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if part == "stack":
                out.last_hidden_state = out.last_hidden_state * 1.5
                return out
            return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5

        at.forward = types.MethodType(own, at)

    ours = copy.deepcopy(model)
    give_own_forward(model)
    if when == "after":
        fastvlm.patch(ours)
    give_own_forward(ours)
    if when == "before":
        fastvlm.patch(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_the_same(numbers(ours, batch), numbers(model, batch))
        tokens = generate(model.eval(), inputs, num_beams=3)
        assert torch.equal(generate(ours.eval(), inputs, num_beams=3), tokens)
    if when == "after" and part != "stack":
        with pytest.raises(PatchError, match=r"a forward of its own \(own\); undo that"):
            fastvlm.unpatch(ours)
        assert is_patched(ours.get_decoder())
    else:
        fastvlm.unpatch(ours)
