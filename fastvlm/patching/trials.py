"""What a stack of a layer or two gives on rows of its own, by which two ways to run it are
compared: outputs and gradients of a padded batch and of one without padding, and where it decodes
those of a prefill and two steps.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastvlm.models.structure import layers_of, submodule, takes
from fastvlm.models.t5gemma2 import MERGED_MASK
from fastvlm.nn.linear import inputs_of
from fastvlm.patching.classes import unpatched_class
from fastvlm.patching.replica import DTYPE, ROWS

# where the attentions of a layer stand
_OWN = (
    *("self_attn", "layer.0.SelfAttention", "attention.self", "attn"),
    "self_attention.attention",
)
_CROSS = (
    *("encoder_attn", "cross_attn", "layer.1.EncDecAttention", "crossattention.self"),
    *("crossattention", "encoder_decoder_attention.attention"),
)
_KEYS = ("k_proj", "k", "key", "c_attn")


def answers(stack: Any) -> list[Tensor]:
    """What a small stack gives: trained on a padded batch; if it decodes, by steps too."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(4, ROWS - 2, (2, 9), generator=random)
    own, cross = (_attention(layers_of(stack)[0], paths) for paths in (_OWN, _CROSS))
    states: dict[str, Any] = {"is_decoder": True} if takes(stack, "is_decoder") else {}
    if own is not None and MERGED_MASK in signature(unpatched_class(own).forward).parameters:
        cross = own  # it reads both
    decodes = bool(states) or cross is not None or getattr(own, "is_causal", False)
    if cross is not None:
        keys = next(cross._modules[name] for name in _KEYS if name in cross._modules)
        read = torch.empty(2, 5, inputs_of(keys), dtype=DTYPE)
        states["encoder_hidden_states"] = read.normal_(generator=random)
        if takes(stack, "encoder_attention_mask"):
            states["encoder_attention_mask"] = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    found = []
    for padded in (True, False):  # which run by ways of their own, in theirs and in ours
        found += _trained(stack, ids, states, padded)
        found += _stepped(stack, ids, states, padded) if decodes else []
    return found


def _attention(layer: Any, paths: tuple[str, ...]) -> Any:
    found = (submodule(layer, path) for path in paths)
    return next((part for part in found if part is not None), None)


def _trained(stack: Any, ids: Tensor, states: dict[str, Any], padded: bool) -> list[Tensor]:
    """Outputs and gradients, in training mode without dropout; padded: behind the second row."""
    mask = torch.ones_like(ids)
    mask[1, 6 if padded else 9 :] = 0
    settings = dict(states)
    if (read := states.get("encoder_hidden_states")) is not None:
        read = read.clone().requires_grad_()
        settings |= {"encoder_hidden_states": read, "use_cache": False}
    wanted = [p for p in stack.parameters() if p.requires_grad]
    if read is not None:
        wanted.append(read)
    stack.train()
    try:
        if takes(stack, "input_features"):  # frames, of which none is padding
            tokens = stack(_features(stack))[0].flatten(0, 1)
        else:
            tokens = stack(input_ids=ids, attention_mask=mask, **settings)[0][mask == 1]
    finally:
        stack.eval()
    grads = torch.autograd.grad(tokens, wanted, torch.cos(tokens.detach()), allow_unused=True)
    shapes = zip(wanted, grads)
    return [tokens.detach(), *(p.new_zeros(p.shape) if g is None else g for p, g in shapes)]


def _features(stack: Any) -> Tensor:
    """Of as many frames as a stack with two convolutions before its positions makes one each of."""
    strides = stack.conv1.stride[0] * stack.conv2.stride[0]
    shape = (2, stack.conv1.in_channels, strides * stack.embed_positions.num_embeddings)
    random = torch.Generator().manual_seed(2)
    return torch.empty(shape, dtype=DTYPE).normal_(generator=random)


@torch.no_grad()
def _stepped(stack: Any, ids: Tensor, states: dict[str, Any], padded: bool) -> list[Tensor]:
    """A prefill and two steps of one token on its cache; padded: in front of the second row."""
    mask = torch.ones_like(ids)
    mask[1, : 2 if padded else 0] = 0
    filled, found, past = ids.shape[1] - 2, [], None
    for first, last in ((0, filled), (filled, filled + 1), (filled + 1, filled + 2)):
        out = stack(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last],
            past_key_values=past,
            use_cache=True,
            **states,
        )
        past = out.past_key_values
        found.append(out[0][mask[:, first:last] == 1])
    return found
