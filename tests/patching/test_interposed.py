"""Hooks, wrappers, forwards and attention of others: seen when patching and when running.

Each case is run unpatched first; what a patched model gives is that, within rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from models import FAMILIES
from sameness import assert_the_same, numbers
from test_families import generate
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastvlm
from fastvlm.nn.wrapped import unwrapped
from fastvlm.patching.patch import is_patched


class Passing(nn.Module):
    """A user's wrapper that answers for what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Dropping(Passing):
    """The same, but for a keyword argument that it does not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("fastvlm_layouts", None)
        return self.inner(*args, **kwargs)


WRAPPERS = {"checkpoint": checkpoint_wrapper, "passing": Passing}


def owner_and_name(model: Any, part: str) -> tuple[Any, str]:
    stack = model.get_decoder()
    if part == "decoder":
        owner = model.model
        name = "decoder" if hasattr(owner, "decoder") else "language_model"
        return (owner, name) if hasattr(owner, name) else (model, "model")
    return stack.layers, "0"


def wrap(model: Any, part: str, wrapper: Callable[[nn.Module], nn.Module]) -> None:
    owner, name = owner_and_name(model, part)
    owner._modules[name] = wrapper(owner._modules[name])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["decoder", "layer"])
@pytest.mark.parametrize(
    ("name", "wrapper"), [("bart", "checkpoint"), ("gemma2", "passing"), ("t5gemma", "passing")]
)
def test_a_stack_or_layer_behind_a_wrapper(name: str, wrapper: str, part: str, when: str) -> None:
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    want = numbers(model, batch)
    if when == "before":
        wrap(model, part, WRAPPERS[wrapper])
    report = fastvlm.patch(model)
    if when == "after":
        wrap(model, part, WRAPPERS[wrapper])
    assert not any(is_patched(m) for m in model.modules() if isinstance(m, Passing))
    assert not any("Wrapper" in entry.kind or entry.kind == "Passing" for entry in report.patched)
    if (wrapper, part, when) == ("passing", "layer", "before"):
        # it may look at what goes through it, and that is to be what it was
        assert any("Passing, which fastvlm does not know" in str(e.reason) for e in report.skipped)
    else:
        decoder = unwrapped(model.get_decoder(), "layers")
        assert is_patched(decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_the_same(numbers(model, batch), want)


@pytest.mark.parametrize("name", ["bart", "gemma2", "florenz"])
def test_a_wrapper_that_drops_keyword_arguments_is_an_error(name: str) -> None:
    """After patching: transformers' own arguments still reach the layer, and ours do not."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    fastvlm.patch(model)
    wrap(model, "layer", Dropping)
    # a class of the user's: the stack runs as transformers computes it
    with pytest.warns(UserWarning, match=r"runs as transformers computes it.*Dropping"):
        loss, _ = numbers(model, batch)
    fastvlm.unpatch(model)
    assert torch.allclose(loss, numbers(model, batch)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["bart", "mbart", "gemma2", "t5gemma", "florenz"])
def test_an_attention_without_layouts_is_an_error(name: str, monkeypatch: Any) -> None:
    """Whatever the look at the stack missed: a number computed without a mask is never given."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    fastvlm.patch(model)
    layer = model.get_decoder().layers[1]
    forward = type(layer.self_attn).forward

    def dropping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is layer.self_attn:
            kwargs.pop("fastvlm_layouts")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(layer.self_attn), "forward", dropping)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layers\.1\.self_attn of"):
        model(**batch)


def led() -> tuple[nn.Module, dict[str, Any]]:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LEDConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=4,
        pad_token_id=1, dropout=0.0, max_encoder_position_embeddings=64,
    )  # fmt: skip
    model = tf.LEDForConditionalGeneration(config).train()
    ids = torch.randint(3, 90, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids}


def test_a_stack_whose_attention_is_not_known_is_left_alone() -> None:
    model, batch = led()
    want = numbers(model, batch)
    report = fastvlm.patch(model)
    stacks = [entry for entry in report.entries if entry.kind.endswith(("Decoder", "Encoder"))]
    assert stacks
    assert all(e.reason is not None for e in stacks)
    assert_the_same(numbers(model, batch), want)


def test_one_layer_of_another_kind_leaves_its_stack_alone() -> None:
    model = FAMILIES["bart"].build()
    batch = FAMILIES["bart"].training(model)

    class Own(type(model.model.decoder.layers[1].self_attn)):  # type: ignore[misc]
        def __init__(self, like: nn.Module) -> None:
            nn.Module.__init__(self)
            self.__dict__.update(like.__dict__)
            self.extra = nn.Linear(2, 2)

    decoder = model.model.decoder
    decoder.layers[1].self_attn = Own(decoder.layers[1].self_attn)
    want = numbers(model, batch)
    report = fastvlm.patch(model)
    assert not is_patched(decoder)
    assert is_patched(model.model.encoder)
    assert any("parts of its own: extra" in (entry.reason or "") for entry in report.skipped)
    assert_the_same(numbers(model, batch), want)


@pytest.mark.slow
@pytest.mark.turns(3)
def test_a_patched_original_and_its_copy_go_their_own_ways() -> None:
    """Layers that two models share: in every order each of them computes what it did."""
    from accelerate.utils import compile_regions

    orders = [
        ("patch m", "copy", "unpatch c"),
        ("patch m", "copy", "unpatch m"),
        ("copy", "patch c", "unpatch c"),
        ("copy", "patch m", "patch c", "unpatch m"),
        ("copy", "patch m", "patch c", "unpatch c", "unpatch m"),
        ("patch m", "copy", "unpatch m", "patch c", "patch m", "unpatch c"),
    ]
    copies = {"regions": lambda m: compile_regions(m, backend="eager"), "copy": copy.copy}
    for name, how in (("bart", "regions"), ("t5gemma", "copy")):
        for order in orders[: 3 if how == "regions" else None]:
            m = FAMILIES[name].build()
            batch = FAMILIES[name].training(m)
            with torch.no_grad():
                want = m(**batch).logits
            models = {"m": m}
            for act in order:
                what, _, which = act.partition(" ")
                if what == "copy":
                    models["c"] = copies[how](m)
                else:
                    getattr(fastvlm, what)(models[which])
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for each in models.values():
                        got = each(**batch).logits
                        seen = batch["labels"] != -100
                        assert torch.allclose(got[seen], want[seen], atol=1e-4), (name, order, act)
            torch.compiler.reset()


@pytest.mark.parametrize("act", ["unpatch copy", "unpatch original"])
def test_shared_layers_unpatched_by_one_of_two(act: str) -> None:
    model = FAMILIES["bart"].build()
    batch = FAMILIES["bart"].training(model)
    with torch.no_grad():
        want = model(**batch).loss
        fastvlm.patch(model)
        twin = copy.copy(model)
        twin.__dict__["_modules"] = dict(model._modules)
        twin.model = copy.copy(model.model)
        twin.model.__dict__["_modules"] = dict(model.model._modules)
        twin.model.decoder = copy.copy(model.model.decoder)
        fastvlm.unpatch(twin if act == "unpatch copy" else model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.allclose(model(**batch).loss, want, rtol=1e-5)
            assert torch.allclose(twin(**batch).loss, want, rtol=1e-5)


def test_a_copy_unpatched_leaves_the_original_fast() -> None:
    model = FAMILIES["bart"].build()
    fastvlm.patch(model)
    twin = copy.copy(model)
    fastvlm.unpatch(twin)
    assert not is_patched(twin)
    assert is_patched(model.model.decoder.layers[0].self_attn)
    del twin
    fastvlm.unpatch(model)
    assert not any(is_patched(m) for m in model.modules())


@pytest.mark.parametrize("part", ["model.decoder", "whole"])
def test_unpatching_by_a_part_or_by_a_whole(part: str) -> None:
    model = FAMILIES["bart"].build()
    fastvlm.patch(model)
    if part == "whole":
        fastvlm.unpatch(nn.ModuleDict({"inside": model}))
        assert not any(is_patched(m) for m in model.modules())
    else:
        fastvlm.unpatch(model.model.decoder)
        assert not any(is_patched(m) for m in model.model.decoder.modules() if m is not model)


@pytest.mark.parametrize("name", ["bart", "gemma2", "florence2"])
def test_a_trace_of_a_patched_model_is_refused(name: str) -> None:
    model = FAMILIES[name].build()
    fastvlm.patch(model)
    batch = FAMILIES[name].training(model)
    del batch["labels"]
    with pytest.raises(RuntimeError, match=r"cannot be traced.*fastvlm.unpatch\(model\) first"):
        torch.jit.trace(model, example_kwarg_inputs=batch, strict=False)
    if name == "florence2":
        with pytest.raises(RuntimeError, match="cannot be traced"):
            torch.jit.trace(model.model.vision_tower, batch["pixel_values"], strict=False)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_an_export_to_onnx_of_a_patched_model_is_refused(name: str) -> None:
    model = FAMILIES[name].build().eval()
    batch = FAMILIES[name].training(model)
    del batch["labels"]
    fastvlm.patch(model)
    exporting = mock.patch("torch.onnx.is_in_onnx_export", return_value=True)
    for strict in (False, True):  # torch.onnx.export tries both
        with exporting, pytest.raises(Exception, match=r"fastvlm.unpatch\(model\) first"):
            torch.export.export(model, (), batch, strict=strict)


def test_quantization_of_a_patched_model_is_refused() -> None:
    from torch.ao import quantization

    model = FAMILIES["bart"].build()
    fastvlm.patch(model)
    with pytest.raises(RuntimeError, match=r"fastvlm.unpatch\(model\) first"):
        quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    fastvlm.unpatch(model)
    small = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "Dynamic" in repr(small.model.decoder.layers[0].fc1)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_a_hook_is_called_with_a_static_cache(name: str) -> None:
    def silences(module: nn.Module, arguments: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    usual = generate(model, inputs, cache_implementation="static")
    fastvlm.patch(model)
    attention = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn"))
    hook = attention.register_forward_hook(silences)
    with pytest.warns(UserWarning, match="hook"):
        got = generate(model, inputs, cache_implementation="static")
    fastvlm.unpatch(model)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), got)
    hook.remove()
    assert not torch.equal(usual, got)
