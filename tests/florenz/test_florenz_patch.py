"""fastvlm.patch on Florenz models, on copies of their structure, and on what only looks like it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Batch, batch, build, gradients, images, prompts, targets
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

import fastvlm
from fastvlm.florenz import FlorenzForConditionalGeneration
from fastvlm.florenz.gemma import FlorenzGemmaDecoder

Model = FlorenzForConditionalGeneration


def generate(model: Model, inputs: Batch, **settings: Any) -> Tensor:
    defaults = {"max_new_tokens": 12, "min_new_tokens": 12, "no_repeat_ngram_size": 2}
    return model.generate(**inputs, **{**defaults, **settings})


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_the_same_tokens(model: Model, inputs: Batch, settings: dict[str, Any]) -> None:
    expected = generate(model, inputs, **settings)
    assert len(set(expected.flatten().tolist())) >= 5
    fastvlm.patch(model)
    assert torch.equal(generate(model, inputs, **settings), expected)
    fastvlm.unpatch(model)
    assert type(model) is Model


def test_the_same_loss_and_gradients_of_a_shared_image_batch(model: Model) -> None:
    ids, mask = prompts(model, [3, 6, 4])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": images(2),
        "labels": targets([7, 3, 5, 2, 6]),
        "image_of_prompt": torch.tensor([1, 0, 1]),
        "prompt_of_target": torch.tensor([2, 0, 1, 2, 2]),
    }
    model.train()
    want, theirs = gradients(model, **inputs)
    fastvlm.patch(model)
    loss, grads = gradients(model, **inputs)
    assert (loss - want).abs() <= 1e-5 * want
    assert grads.keys() == theirs.keys()
    total = torch.stack([g.abs().max() for g in theirs.values()]).max()
    for name, gradient in theirs.items():
        assert (grads[name] - gradient).abs().max() <= 1e-5 * total, name


def test_every_layer_of_the_gemma_decoder_is_patched() -> None:
    model = build("3.5B")
    report = fastvlm.patch(model)
    ops = {entry.module: entry.ops for entry in report.patched}
    assert ops["model.decoder"] == ("Layout",)
    for index in range(2):
        layer = f"model.decoder.layers.{index}"
        assert ops[f"{layer}.encoder_attn"] == ("cross_attention",)
        assert "self_attention" in ops[f"{layer}.self_attn"]
        assert ops[f"{layer}.mlp"] == ("geglu_mlp",)
    assert [entry.module for entry in report.skipped] == ["model.multi_modal_projector"]


def test_layers_of_another_name_are_recognised() -> None:
    """A trainer's own copy: only the structure and the names of its parts are the same."""

    class OwnDecoder(FlorenzGemmaDecoder):
        pass

    class OwnNorm(nn.Module):
        def __init__(self, other: Gemma2RMSNorm):
            super().__init__()
            self.weight, self.variance_epsilon = other.weight, other.eps

        def forward(self, x: Tensor) -> Tensor:
            y = x.float()
            y = y * (y.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
            return (y * (1 + self.weight.float())).type_as(x)

    model = build("3.5B")
    inputs = batch(model)
    model.model.decoder.__class__ = OwnDecoder
    expected = generate(model, inputs, num_beams=3)
    report = fastvlm.patch(model)
    assert ("model.decoder", ("Layout",)) in [(e.module, e.ops) for e in report.patched]
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    fastvlm.unpatch(model)
    # a norm that nobody knows may look at more than its row: its stack is as it was
    for layer in model.model.decoder.layers:
        layer.post_encoder_attention_layernorm = OwnNorm(layer.post_encoder_attention_layernorm)
    report = fastvlm.patch(model)
    (reason,) = (e.reason for e in report.skipped if e.module == "model.decoder")
    assert reason is not None
    assert "OwnNorm, which fastvlm does not know" in reason
    assert torch.equal(generate(model, inputs, num_beams=3), expected)


class OtherCrossAttention(nn.Module):
    """Calls what it reads by another name."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.inner(hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)


def test_another_cross_attention_leaves_the_stack_alone() -> None:
    model = build("3.5B")
    inputs = batch(model)
    layer = model.model.decoder.layers[1]
    layer.encoder_attn = OtherCrossAttention(layer.encoder_attn)
    expected = generate(model, inputs, num_beams=2)
    report = fastvlm.patch(model)
    reasons = {entry.module: entry.reason for entry in report.skipped}
    reason = reasons["model.decoder"] or ""
    assert "layers.1.encoder_attn is a test_florenz_patch.OtherCrossAttention" in reason
    assert torch.equal(generate(model, inputs, num_beams=2), expected)


def test_a_layer_without_the_cross_attention_leaves_the_stack_alone() -> None:
    model = build("3.5B")
    inputs = batch(model)
    layer = model.model.decoder.layers[1]

    class Closed(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            kwargs.pop("encoder_attention_mask")
            return super().forward(hidden_states, None, **kwargs)

    layer.__class__ = Closed
    del layer.encoder_attn_gate
    expected = generate(model, inputs)
    report = fastvlm.patch(model)
    reasons = {entry.module: entry.reason for entry in report.skipped}
    assert reasons["model.decoder"] == "its layer 1 has no gated cross-attention"
    assert torch.equal(generate(model, inputs), expected)


def test_the_rest_of_the_package_does_not_know_the_workload() -> None:
    """But for `fastvlm.load`, the one room that loads its checkpoints."""
    root = Path(fastvlm.__file__).parent
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "florenz") or path.is_relative_to(root / "loading"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            assert not any(name.startswith("fastvlm.florenz") for name in names), path
