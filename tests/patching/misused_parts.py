"""More of `misuses`: what people do to the parts of a patched model."""

from __future__ import annotations

import copy

import torch
from misuses import (
    Results,
    Scene,
    both,
    decoder_layers,
    last_projection,
    logits,
    trained,
    use,
)
from models import VOCAB
from torch import nn


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
