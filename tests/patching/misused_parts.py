"""More of `misuses`: what people do to the parts of a patched model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from misuses import (
    Results,
    Scene,
    both,
    decoder_layers,
    last_projection,
    logits,
    tokens,
    trained,
    use,
)
from models import VOCAB
from torch import nn
from torch.nn.utils import parametrizations, prune


@use
def half_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.bfloat16()
    batch = {n: v.bfloat16() if v.is_floating_point() else v for n, v in s.batch.items()}
    return logits(s.model, batch)


@use
def tie_broken_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    head = s.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() * 0.9)
    s.model.train()
    return {**trained(s.model, s.batch), **both(s.model.eval(), s.prompt)}


@use
def resized_after_patch_then_trained(s: Scene) -> Results:
    s.put_in(s.model)
    torch.manual_seed(3)
    s.model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    s.model.train()
    return {**trained(s.model, s.batch), **both(s.model.eval(), s.prompt)}


@use
def functional_call_with_other_weights(s: Scene) -> Results:
    s.put_in(s.model)
    other = {n: p.detach() * 1.1 for n, p in s.model.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(s.model, other, (), s.batch, tie_weights=True)
        again = s.model(**s.batch)
    return {"loss": out.loss, "again": again.loss}


@use
def deepcopy_under_no_grad(s: Scene) -> Results:
    s.put_in(s.model)
    with torch.no_grad():
        s.model(**s.batch)
        twin = copy.deepcopy(s.model)
        for p in twin.parameters():
            p.mul_(1.1)
    return {**both(twin, s.prompt, "-twin"), **both(s.model, s.prompt),
            **trained(twin.train(), s.batch)}  # fmt: skip


@use
def loaded_with_assign(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    state = {n: v * 1.1 if v.is_floating_point() else v for n, v in s.model.state_dict().items()}
    s.model.load_state_dict(state, assign=True)
    s.model.tie_weights()
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def patched_under_inference_mode(s: Scene) -> Results:
    with torch.inference_mode():
        s.put_in(s.model)
    return {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def projection_swapped_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    parent, name = last_projection(s.model)
    old = getattr(parent, name)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(old.weight * 1.3)
        if old.bias is not None:
            new.bias.copy_(old.bias)
    setattr(parent, name, new)
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def layer_removed_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    layers = decoder_layers(s.model)
    del layers[-1]
    text = s.model.config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "decoder_layers"):
        if hasattr(text, name):
            setattr(text, name, len(layers))
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def softcap_changed_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    found = both(s.model, s.prompt, "-before")
    for config in {
        id(m.config): m.config for m in s.model.modules() if hasattr(m, "config")
    }.values():
        if getattr(config, "final_logit_softcapping", None):
            config.final_logit_softcapping = 3.0
    for module in s.model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping = 0.5
    return {**found, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def window_changed_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    found = both(s.model, s.prompt, "-before")
    for module in s.model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 3
        if hasattr(module, "config") and getattr(module.config, "sliding_window", None):
            module.config.sliding_window = 3
    return {**found, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def scale_changed_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    found = both(s.model, s.prompt, "-before")
    for module in s.model.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling = module.scaling * 2
    return {**found, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def hooks_after_the_first_call(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    parent, name = last_projection(s.model)
    handle = getattr(parent, name).register_forward_hook(lambda m, a, out: out * 1.5)
    found = {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}
    handle.remove()
    return {**first, **found, **both(s.model.eval(), s.prompt, "-after")}


@use
def hook_on_a_whole_layer(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")

    def double(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0] * 1.2, *out[1:]) if isinstance(out, tuple) else out * 1.2

    handle = decoder_layers(s.model)[0].register_forward_hook(double)
    found = {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}
    handle.remove()
    return {**first, **found, **both(s.model.eval(), s.prompt, "-after")}


@use
def weight_norm_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    parent, name = last_projection(s.model)
    parametrizations.weight_norm(getattr(parent, name))
    with torch.no_grad():
        getattr(parent, name).parametrizations.weight.original0.mul_(1.5)
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def pruned_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    parent, name = last_projection(s.model)
    prune.l1_unstructured(getattr(parent, name), "weight", amount=0.5)
    found = {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}
    prune.remove(getattr(parent, name), "weight")
    return {**first, **found, **both(s.model.eval(), s.prompt, "-after")}


@use
def frozen_in_the_middle_of_training(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.train()
    first = trained(s.model, s.batch, " first")
    s.model.get_input_embeddings().weight.requires_grad_(False)
    for parameter in decoder_layers(s.model)[0].parameters():
        parameter.requires_grad_(False)
    second = trained(s.model, s.batch, " frozen")
    for parameter in s.model.parameters():
        parameter.requires_grad_(True)
    return {**first, **second, **trained(s.model, s.batch, " again")}


@use
def pickled_patched(s: Scene) -> Results:
    s.put_in(s.model)
    tokens(s.model, s.prompt)
    twin = pickle.loads(pickle.dumps(s.model))
    buffer = io.BytesIO()
    torch.save(s.model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    return {**both(twin, s.prompt), **trained(saved.train(), s.batch)}


@use
def replicas_that_share_weights(s: Scene) -> Results:
    """As DataParallel's: shallow copies of modules, with the parameters of one."""
    s.put_in(s.model)

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else replica(child)
        twin._parameters = dict(module._parameters)
        return twin

    twin = replica(s.model)
    return {**both(twin, s.prompt), "loss": twin.train()(**s.batch).loss.detach(),
            **trained(s.model.train(), s.batch)}  # fmt: skip


@use
def checkpointing_toggled(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.train()
    found = trained(s.model, s.batch)
    s.model.gradient_checkpointing_enable({"use_reentrant": False})
    found |= trained(s.model, s.batch, " checkpointed")
    s.model.gradient_checkpointing_disable()
    found |= trained(s.model, s.batch, " again")
    return {**found, **both(s.model.eval(), s.prompt)}


@use
def weights_moved_in_place_between_calls(s: Scene) -> Results:
    s.put_in(s.model)
    found = both(s.model, s.prompt, "-before")
    with torch.no_grad():
        for parameter in s.model.parameters():
            parameter.data = parameter.data * 1.1
    found |= both(s.model, s.prompt)
    vector = nn.utils.parameters_to_vector(s.model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.95, s.model.parameters())
    return {**found, **both(s.model, s.prompt, "-vector"), **trained(s.model.train(), s.batch)}


@use
def loss_of_a_model_that_shares_a_decoder(s: Scene) -> Results:
    """Two models over the same parts: one is patched, the other is not."""
    twin = copy.copy(s.model)
    twin._modules = dict(s.model._modules)
    s.put_in(s.model)
    found = {**both(s.model, s.prompt), **both(twin, s.prompt, " twin")}
    found |= trained(twin.train(), s.batch, " twin")
    return {**found, **trained(s.model.train(), s.batch)}


@use
def a_layer_put_in_that_was_never_patched(s: Scene) -> Results:
    layers = decoder_layers(s.model)
    twin = copy.deepcopy(layers[-1])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    layers[-1] = twin
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def activation_replaced_after_patch(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    for layer in decoder_layers(s.model):
        owner, name = (layer, "activation_fn") if s.encodes else (layer.mlp, "act_fn")
        setattr(owner, name, nn.ReLU())
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


def _with_activation(s: Scene, act: Any) -> None:
    for layer in decoder_layers(s.model):
        owner, name = (layer, "activation_fn") if s.encodes else (layer.mlp, "act_fn")
        owner._modules.pop(name, None)
        setattr(owner, name, act)


@use
def activation_that_drops_in_training(s: Scene) -> Results:
    """All of it, so that nothing is drawn; when it is evaluated it drops nothing."""
    _with_activation(s, nn.Sequential(nn.GELU(), nn.Dropout(1.0)).eval())
    s.put_in(s.model)
    return {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def activation_of_the_same_type_after_patch(s: Scene) -> Results:
    """One lambda instead of another."""
    _with_activation(s, lambda x: nn.functional.gelu(x))
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    _with_activation(s, lambda x: nn.functional.silu(x) * 2)
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def slope_of_an_activation_changed_after_patch(s: Scene) -> Results:
    act = nn.LeakyReLU(0.0)
    _with_activation(s, act)
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    act.negative_slope = 0.3
    return {**first, **both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def bias_of_the_head_after_patch(s: Scene) -> Results:
    """BART adds another behind it."""
    s.put_in(s.model)
    head = s.model.get_output_embeddings()
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    head.bias = nn.Parameter(bias)
    return {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}


@use
def layers_left_out_by_the_configuration(s: Scene) -> Results:
    """As an assistant that exits early: the layers stay where they are."""
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    text = s.model.config.get_text_config(decoder=True)
    kept = text.num_hidden_layers
    text.num_hidden_layers = 1
    found = {**both(s.model, s.prompt), **trained(s.model.train(), s.batch)}
    text.num_hidden_layers = kept
    return {**first, **found, **both(s.model.eval(), s.prompt, "-after")}


@use
def bool_mask_of_four_dimensions(s: Scene) -> Results:
    """Transformers' eager attention adds it to the scores, whatever was meant."""
    s.model.set_attn_implementation("eager")
    s.put_in(s.model)
    labels = s.batch["labels"]
    rows, length = labels.shape
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    name = "decoder_attention_mask" if s.encodes else "attention_mask"
    return trained(s.model.train(), {**s.batch, name: mask})
