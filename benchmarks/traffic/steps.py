"""A whole decoding step of a Florenz model: token ids in, the best continuations of its beams out.

Embedding, all decoder layers with their caches filled, last norm, head, and the top 2 * beams of
each image, as beam search takes them. Logits processors and the bookkeeping of generate() are left
out on every side. Where the beams change places afterwards, the caches are reordered; that is
counted apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from benchmarks.traffic.counter import DEVICE
from benchmarks.traffic.inputs import Decoding, fill, without_values
from fastvlm import layout as layouts
from fastvlm.decoding.cache import in_groups
from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration
from fastvlm.generate.bans import NONE
from fastvlm.generate.head import Head, Last
from fastvlm.generate.ranking import best_of_images


@dataclass
class Inputs:
    """ids [rows, 1]. states [images or rows, E, d] and their mask. scores [images, beams]: of the
    beams so far. order [rows]: the row that each row goes on from."""

    ids: Tensor
    states: Tensor
    mask: Tensor
    scores: Tensor
    order: Tensor
    cache: EncoderDecoderCache


def model_of(config: FlorenzConfig, attention: str = "eager") -> Any:
    """Shapes without memory, in bfloat16."""
    config._attn_implementation = attention
    with torch.device(DEVICE):
        model = FlorenzForConditionalGeneration(config)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def inputs_of(config: FlorenzConfig, work: Decoding, copies: int, device: str) -> Inputs:
    """copies: of the encoder's states, work.beams where each row has its own."""
    shape = work.images * copies, work.keys
    options: dict[str, Any] = {"device": device}
    with without_values():
        cache = EncoderDecoderCache(DynamicCache(config=config.decoder), DynamicCache())
    return Inputs(
        ids=torch.zeros(work.rows, 1, dtype=torch.int64, **options),
        states=torch.empty(*shape, config.encoder.d_model, dtype=torch.bfloat16, **options),
        mask=torch.ones(shape, dtype=torch.int64, **options),
        scores=torch.zeros(work.images, work.beams, dtype=torch.float32, **options),
        order=torch.zeros(work.rows, dtype=torch.int64, **options),
        cache=cache,
    )


def fill_caches(model: Any, x: Inputs, work: Decoding) -> None:
    """Both caches, as transformers' own attention fills them before this step."""
    config = model.config.decoder
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    make = lambda n: torch.empty(  # noqa: E731
        work.rows, kv_heads, n, width, dtype=torch.bfloat16, device=x.ids.device
    )
    for index in range(config.num_hidden_layers):
        own, cross = ([make(n), make(n)] for n in (work.filled - 1, work.keys))
        fill(x.cache.self_attention_cache, index, *own)
        fill(x.cache.cross_attention_cache, index, *cross)
        x.cache.is_updated[index] = True


def prefill(model: Any, x: Inputs, work: Decoding) -> None:
    """Both caches, by a call of a patched model; the beams have changed places since. The first
    step, which makes what all steps share, is over."""
    ids = x.ids.expand(-1, work.filled - 2)
    with known_lengths():
        model(
            decoder_input_ids=ids, encoder_outputs=BaseModelOutput(x.states), attention_mask=x.mask,
            past_key_values=x.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        states(model, x)
    reorder(x)


def reorder(x: Inputs) -> None:
    """The beams of each image change places, as beam search says to a patched model."""
    with in_groups(x.cache):
        x.cache.reorder_cache(x.order)


def states(model: Any, x: Inputs) -> Tensor:
    """The decoder's last states, [rows, d]."""
    found: Tensor = model.model(
        decoder_input_ids=x.ids, encoder_outputs=BaseModelOutput(x.states), attention_mask=x.mask,
        past_key_values=x.cache, use_cache=True,
    ).last_hidden_state[:, -1]  # fmt: skip
    return found


def head(model: Any, h: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, softcap, log-softmax in float32, and the best of each image, as transformers' beam
    search makes them."""
    cap, (images, beams) = model.config.final_logit_softcapping, scores.shape
    logits = model.lm_head(h.unsqueeze(1))
    logits = (logits / cap).tanh() * cap
    logits = logits[:, -1, :].to(copy=True, dtype=torch.float32, device=h.device)
    found = torch.nn.functional.log_softmax(logits, dim=-1)
    found = torch.reshape(found, [images, beams, found.shape[-1]]) + scores[:, :, None]
    found = torch.reshape(found, (images, -1))
    return torch.topk(found, k=2 * beams)  # type: ignore[return-value]


def ranked(model: Any, h: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the decoding loop of a patched model."""
    head = Head(model.lm_head, None, model.config.final_logit_softcapping)
    return best_of_images(Last(h, head), scores, 2 * scores.shape[1], NONE)


@contextlib.contextmanager
def known_lengths(compiling: bool = False) -> Iterator[None]:
    """A mask has no values here: all of it is tokens."""

    def from_mask(argument: str, mask: Tensor) -> tuple[list[int], layouts.Padding]:
        rows, length = mask.shape
        return [length] * rows, layouts.Padding(rows, length, None)

    def no(*args: Any, **kwargs: Any) -> bool:
        return False

    answers = {
        # masks stay, as of images whose prompts differ in length
        "transformers.masking_utils._ignore_bidirectional_mask_sdpa": no,
        "transformers.masking_utils._ignore_causal_mask_sdpa": no,
        "fastvlm.florenz.readers.torch_compilable_check": no,
        # "meta" is no device that autocast knows
        "torch.is_autocast_enabled": no,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(layouts, "_from_mask", from_mask))
        for name, answer in answers.items():
            if not compiling or name.startswith("transformers"):
                stack.enter_context(mock.patch(name, answer))
        yield


def patched(model: Any) -> Any:
    with torch.random.fork_rng():
        report = fastvlm.patch(model)
    assert not [e for e in report.skipped if "meta" in (e.reason or "")], report
    return model
