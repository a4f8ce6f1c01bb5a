"""Things that people do to a patched model, or around one, that its patch was not made for.

A use is given a model, its batch for training, that for generate(), and put_in, which patches the
model (or, for comparison, does not), at the moment that matters. It returns named tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import PAD
from torch import Tensor, nn

Results = dict[str, Tensor]


@dataclass
class Scene:
    """model, its batches, and put_in(model), which patches it or does nothing."""

    model: Any
    batch: dict[str, Tensor]
    prompt: dict[str, Tensor]
    put_in: Callable[[nn.Module], Any]

    @property
    def encodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)


Use = Callable[[Scene], Results]
USES: dict[str, Use] = {}
# uses of an encoder's states or of a decoder's own prompt
OF_ENCODERS = (
    "encoder_outputs_used_again",
    "decoder_mask_given",
    "prefixes_of_several_lengths",
    "padded_prefixes",
)


def use(function: Use) -> Use:
    USES[function.__name__] = function
    return function


def tokens(model: Any, prompt: dict[str, Any], beams: int = 1, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}
    with torch.no_grad():
        out = model.generate(**prompt, num_beams=beams, suppress_tokens=[PAD], **settings)
    return out if isinstance(out, Tensor) else out.sequences


def both(model: Any, prompt: dict[str, Any], name: str = "", **settings: Any) -> Results:
    return {
        f"greedy{name}": tokens(model, prompt, **settings),
        f"beams{name}": tokens(model, prompt, 3, **settings),
    }


def trained(model: Any, batch: dict[str, Any], name: str = "") -> Results:
    """The loss and all gradients of a step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {f"loss{name}": loss.detach(), **{f"{n}{name}": g for n, g in found.items()}}


def logits(model: Any, batch: dict[str, Any], name: str = "") -> Results:
    with torch.no_grad():
        out = model(**batch).logits
    labels = batch.get("labels")
    mask = batch.get("attention_mask") if not model.config.is_encoder_decoder else None
    if labels is not None and model.config.is_encoder_decoder:
        mask = labels != -100
    if isinstance(mask, Tensor) and mask.shape == out.shape[:2]:
        out = out[mask != 0]
    return {f"logits{name}": out}


def decoder_layers(model: Any) -> nn.ModuleList:
    found = [
        m for n, m in model.named_modules()
        if n.endswith("layers") and isinstance(m, nn.ModuleList) and "encoder" not in n
        and "vision" not in n
    ]  # fmt: skip
    return found[-1]


def last_projection(model: Any, end: str = "self_attn.q_proj") -> tuple[Any, str]:
    """(parent, name) of a linear layer in the last decoder layer."""
    layer = decoder_layers(model)[-1]
    parent = layer.get_submodule(end.rpartition(".")[0])
    return parent, end.rpartition(".")[2]


@use
def accumulation_over_changing_shapes(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.train()
    optimizer = torch.optim.AdamW(s.model.parameters(), lr=1e-3)
    losses = []
    for step in range(2):
        for rows in (slice(0, 1), slice(1, 3), slice(0, 3)):
            loss = s.model(**{n: v[rows] for n, v in s.batch.items()}).loss / 3
            loss.backward()
            losses.append(loss.detach())
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": torch.stack(losses), **grads(s.model)}


def grads(model: Any) -> Results:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@use
def autocast_around_generate(s: Scene) -> Results:
    s.put_in(s.model)
    asked = {"return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = s.model.generate(**s.prompt, max_new_tokens=4, do_sample=False, **asked)
    return {"first step": out.logits[0].float()}


@use
def inputs_embeds_to_generate(s: Scene) -> Results:
    s.put_in(s.model)
    ids = s.prompt["input_ids"].clamp_max(90)
    prompt = {"inputs_embeds": s.model.get_input_embeddings()(ids).detach(),
              "attention_mask": s.prompt["attention_mask"]}  # fmt: skip
    return both(s.model, prompt)


@use
def encoder_outputs_used_again(s: Scene) -> Results:
    s.put_in(s.model)
    from transformers.modeling_outputs import BaseModelOutput

    ids = s.prompt["input_ids"].clamp_max(90)
    mask = s.prompt["attention_mask"]
    with torch.no_grad():
        states = s.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    found: Results = {}
    for number, beams in enumerate((1, 3, 2)):
        prompt = {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask}
        found[f"tokens {number}"] = tokens(s.model, prompt, beams)
    return found


@use
def labels_all_ignored(s: Scene) -> Results:
    """Where the model itself takes the mean of nothing, the loss is NaN, and so it is with ours."""
    s.put_in(s.model)
    s.model.train()
    batch = {**s.batch, "labels": torch.full_like(s.batch["labels"], -100)}
    loss = s.model(**batch, num_items_in_batch=torch.tensor(1)).loss
    loss.backward()
    return {"is NaN": loss.detach().isnan(), "loss": loss.detach().nan_to_num()}


@use
def batch_of_one_token(s: Scene) -> Results:
    s.put_in(s.model)
    ids = torch.tensor([[7]])
    if s.encodes:
        batch = {"input_ids": ids, "labels": torch.tensor([[9]])}
    else:
        batch = {"input_ids": torch.tensor([[7, 8]]), "labels": torch.tensor([[7, 8]])}
    return {**trained(s.model.train(), batch), **both(s.model.eval(), {"input_ids": ids})}


@use
def padding_on_the_left(s: Scene) -> Results:
    s.put_in(s.model)
    flipped = {n: v.flip(1) if n in ("input_ids", "attention_mask") else v
               for n, v in s.batch.items()}  # fmt: skip
    if not s.encodes:
        flipped["labels"] = s.batch["labels"].flip(1)
    return {**trained(s.model.train(), flipped), **logits(s.model.eval(), flipped)}


@use
def mask_with_holes(s: Scene) -> Results:
    s.put_in(s.model)
    mask = s.batch["attention_mask"].clone()
    mask[0, -2] = 0
    mask[2, -4] = 0
    batch = {**s.batch, "attention_mask": mask}
    if not s.encodes:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {**trained(s.model.train(), batch), **logits(s.model.eval(), batch)}


def _mask_as(kind: torch.dtype) -> Use:
    def run(s: Scene) -> Results:
        s.put_in(s.model)
        batch = {**s.batch, "attention_mask": s.batch["attention_mask"].to(kind)}
        prompt = {**s.prompt, "attention_mask": s.prompt["attention_mask"].to(kind)}
        return {**trained(s.model.train(), batch), **logits(s.model.eval(), batch),
                "greedy": tokens(s.model, prompt)}  # fmt: skip

    return run


for _kind in (torch.bool, torch.float32, torch.int8):
    USES[f"mask_of_{str(_kind)[6:]}"] = _mask_as(_kind)


@use
def decoder_mask_given(s: Scene) -> Results:
    s.put_in(s.model)
    ids = s.batch["labels"].clamp_min(3)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    rest = {n: v for n, v in s.batch.items() if n != "labels"}
    batch = {**rest, "decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels}
    return {**trained(s.model.train(), batch), **logits(s.model.eval(), batch)}


@use
def prefixes_of_several_lengths(s: Scene) -> Results:
    s.put_in(s.model)
    found: Results = {}
    for length in (1, 3, 2, 5):
        start = torch.full((3, length), 7)
        start[:, 0] = 2
        prompt = {**s.prompt, "decoder_input_ids": start}
        found |= both(s.model, prompt, f" {length}")
    return found


@use
def padded_prefixes(s: Scene) -> Results:
    s.put_in(s.model)
    start = torch.tensor([[PAD, PAD, 2, 7], [PAD, 2, 8, 9], [2, 7, 5, 6]])
    prompt = {
        **s.prompt,
        "decoder_input_ids": start,
        "decoder_attention_mask": (start != PAD).long(),
    }
    return both(s.model, prompt)


@use
def attentions_asked_now_and_then(s: Scene) -> Results:
    s.model.set_attn_implementation("eager")
    s.put_in(s.model)
    found: Results = {}
    for number, asked in enumerate((False, True, False, True)):
        with torch.no_grad():
            out = s.model(**s.batch, output_attentions=asked, output_hidden_states=not asked)
        keep = out.loss
        found[f"loss {number}"] = keep
        seen = out.get("decoder_attentions") or out.get("attentions")
        if asked:
            found[f"attention {number}"] = seen[-1][0]
    return {**found, **both(s.model, s.prompt)}


@use
def generation_config_changed(s: Scene) -> Results:
    s.put_in(s.model)
    first = both(s.model, s.prompt, "-before")
    config = s.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 1.5, 2
    config.num_return_sequences = 1
    return {**first, **both(s.model, s.prompt), **both(s.model, s.prompt, "-uncached",
            use_cache=False)}  # fmt: skip


@use
def generated_in_the_middle_of_training(s: Scene) -> Results:
    """model.train() stays on, as in reinforcement learning; dropout is off."""
    s.put_in(s.model)
    s.model.train()
    found = trained(s.model, s.batch)
    loss = s.model(**s.batch).loss
    found |= both(s.model, s.prompt)
    loss.backward()
    return {**found, **{f"{n} after": g for n, g in grads(s.model).items()}}


@use
def logits_and_loss_both_differentiated(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.train()
    out = s.model(**s.batch)
    counted = s.batch["labels"] != -100
    (out.loss + out.logits[counted].float().pow(2).mean()).backward()
    return {"loss": out.loss.detach(), **grads(s.model)}


@use
def backward_twice(s: Scene) -> Results:
    s.put_in(s.model)
    s.model.train()
    loss = s.model(**s.batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return grads(s.model)
