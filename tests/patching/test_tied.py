"""A tied embedding adds its gradient to the head's: the same sums, one tensor of that size."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from models import FAMILIES
from test_loss_without_logits import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlm
from fastvlm.patching.tied import TiedEmbedding

TIED = ["bart", "mbart", "florence2", "gemma2", "t5gemma", "florenz"]


def pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    plain = FAMILIES[name].build().train()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    assert any(isinstance(m, TiedEmbedding) for m in ours.modules())
    return plain, ours, FAMILIES[name].training(plain)


class Dense(TorchDispatchMode):
    """Counts gradients of a whole table that PyTorch's embedding makes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.embedding_dense_backward.default
        return func(*args, **(kwargs or {}))


def dense(loss: torch.Tensor) -> int:
    with Dense() as counted:
        loss.backward()
    return counted.count


@pytest.mark.parametrize("name", TIED)
def test_gradients_and_what_is_made_for_them(name: str) -> None:
    plain, ours, batch = pair(name)
    head = plain.get_output_embeddings().weight
    lookups: list[Any] = []
    for module in plain.modules():
        if isinstance(module, nn.Embedding) and module.weight is head:
            module.register_forward_hook(lambda m, args, out: lookups.append(m))
    theirs = dense(plain(**batch).loss)
    assert lookups
    assert dense(ours(**batch).loss) == theirs - len(lookups)
    assert_same(ours, plain, 1e-4)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_pad_tokens_get_none(name: str) -> None:
    """padding_idx: transformers' embeddings keep their pad row out of the gradient."""
    plain, ours, batch = pair(name)
    with torch.no_grad():
        for model in (plain, ours):
            model.get_output_embeddings().weight[1] += 1
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert_same(ours, plain, 1e-4)


def test_accumulation_second_use_and_other_losses() -> None:
    plain, ours, batch = pair("bart")
    for model in (plain, ours):
        model(**batch).loss.backward()
        loss = model(**batch).loss  # into gradients that are there
        loss.backward(retain_graph=True)
        loss.backward()
        logits = model(**batch).logits[batch["labels"] != -100]
        logits.square().mean().backward()  # not through the loss
        out = model(**batch)
        (out.loss + out.logits[:, 0].sum() * 1e-3).backward()  # through both
    assert_same(ours, plain, 1e-3)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("use", ["two calls", "before", "after", "in between"])
def test_others_contribute_to_the_same_gradient(name: str, use: str) -> None:
    plain, ours, batch = pair(name)
    other = {k: v.flip(0) if v.dim() < 4 else v for k, v in batch.items()}
    if name in ("gemma2",):
        other["labels"] = batch["labels"].roll(1, 0).masked_fill(other["attention_mask"] == 0, -100)
    for model in (plain, ours):
        weight = model.get_output_embeddings().weight
        found = [weight.square().sum() * 1e-2] if use == "before" else []
        if use == "in between":
            stack = model.get_decoder()
            stack = getattr(stack, "decoder", stack)
            stack.layers[1].register_forward_pre_hook(
                lambda *args, f=found, w=weight: f.append(w.square().sum() * 1e-2)
            )
        loss = model(**batch).loss
        if use == "two calls":
            loss = loss + model(**other).loss
        if use == "after":
            found.append(weight.square().sum() * 1e-2)
        (loss + sum(found)).backward()
    assert_same(ours, plain, 1e-4)


def test_a_backward_pass_that_reaches_some_lookups_only() -> None:
    plain, ours, batch = pair("bart")
    found = []
    for model in (plain, ours):
        states: list[torch.Tensor] = []

        def detached(m: Any, args: Any, out: Any, states: Any = states) -> Any:
            states.append(out[0])
            out["last_hidden_state"] = out[0].detach()
            return out

        model.model.encoder.register_forward_hook(detached)
        out = model(**batch)
        (grad,) = torch.autograd.grad(out.loss, model.lm_head.weight, retain_graph=True)
        kept = grad.clone()
        states[0][batch["attention_mask"] != 0].square().mean().backward()
        assert torch.equal(grad, kept)  # the user's
        found.append((grad, model.lm_head.weight.grad))
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.usefixtures("young_collector")
def test_nothing_is_kept_of_a_call(name: str, backward: bool) -> None:
    """Python's collector cannot see a cycle through autograd's nodes."""
    _, model, batch = pair(name)
    rows = len(batch["labels"])
    kept = []
    for _ in range(3):
        out = model(**batch, groups=torch.zeros(rows).long(), num_groups=1)
        request = out.__dict__["logits"].request
        assert (request.packed, request.table) == (None, None)  # of which an output has no need
        kept.append(weakref.ref(request))
        del request
        if backward:
            out.loss.backward()
        del out
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    weight = weakref.ref(model.get_output_embeddings().weight)
    del model
    gc.collect()
    assert weight() is None


def test_gradients_of_the_table_alone_and_of_others_alone() -> None:
    plain, ours, batch = pair("florence2")
    for name in ("lm_head.weight", "model.language_model.decoder.layers.0.fc1.weight"):
        grads = [
            torch.autograd.grad(m(**batch).loss, m.get_parameter(name))[0] for m in (plain, ours)
        ]
        assert torch.allclose(*grads, atol=1e-5)


def test_a_frozen_table() -> None:
    plain, ours, batch = pair("gemma2")
    for model in (plain, ours):
        model.lm_head.weight.requires_grad_(False)
        model(**batch).loss.backward()
    assert ours.lm_head.weight.grad is None
    assert_same(ours, plain, 1e-4)


def test_hooks_on_the_parameter_see_the_whole_gradient() -> None:
    plain, ours, batch = pair("bart")
    seen: list[torch.Tensor] = []
    for model in (plain, ours):
        model.lm_head.weight.register_hook(lambda g: seen.append(g.clone()))
        model.lm_head.weight.register_post_accumulate_grad_hook(
            lambda p: seen.append(p.grad.clone())
        )
        model(**batch).loss.backward()
    assert torch.allclose(seen[2], seen[0], atol=1e-4)
    assert torch.allclose(seen[3], seen[1], atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_in_a_checkpoint(reentrant: bool) -> None:
    plain, ours, batch = pair("bart")
    for model in (plain, ours):
        model.zero_grad()

    def loss(model: nn.Module, anchor: torch.Tensor) -> torch.Tensor:
        return model(**batch).loss + 0 * anchor

    anchor = torch.zeros((), requires_grad=True)
    torch.utils.checkpoint.checkpoint(loss, ours, anchor, use_reentrant=reentrant).backward()
    plain(**batch).loss.backward()
    assert_same(ours, plain, 1e-4)


def test_untied_and_peculiar_embeddings_stay() -> None:
    model = FAMILIES["bart"].build(tie_word_embeddings=False)
    fastvlm.patch(model)
    assert not any(isinstance(m, TiedEmbedding) for m in model.modules())
    model = FAMILIES["t5gemma"].build()
    model.get_decoder().embed_tokens.scale_grad_by_freq = True
    report = fastvlm.patch(model)
    assert any("no plain sum of rows" in (e.reason or "") for e in report.skipped)


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_a_second_derivative_is_refused(name: str) -> None:
    """Of a gradient penalty, which without a word would have no gradient."""
    model = FAMILIES[name].build()
    batch = FAMILIES[name].training(model)
    fastvlm.patch(model)
    weight = list(model.parameters())[-1]
    loss = model.train()(**batch).loss
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    (usual,) = torch.autograd.grad(model(**batch).loss, weight)
    assert torch.equal(grad, usual)
    with pytest.raises(RuntimeError, match="its ops have no second derivative"):
        (loss + grad.square().sum()).backward()
