"""What is trained, and how many parameters each part has (arXiv 2503.09443, sections 1 and 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from fastvlm.florenz.model import FlorenzForConditionalGeneration

# of a Gemma decoder, beside its tied embedding
_INSERTED = ("encoder_attn.", "encoder_attn_gate", "post_encoder_attention_layernorm.")


def is_inserted(name: str) -> bool:
    """Whether a parameter belongs to the cross-attention that was put into a Gemma layer."""
    return ".layers." in f".{name}" and any(f".{part}" in f".{name}" for part in _INSERTED)


def freeze_as_published(model: FlorenzForConditionalGeneration) -> FlorenzForConditionalGeneration:
    """Set requires_grad as both published training stages do; returns the model.

    Frozen: the vision tower and the projector, and of a Gemma decoder all but the inserted
    cross-attention (with gate and norm) and the embedding that is tied to the head. Trained:
    everything else. Dropout and DropPath of frozen parts stay as ``train()`` or ``eval()`` sets
    them.
    """
    inner = model.model
    model.requires_grad_(True)
    inner.vision_tower.requires_grad_(False)
    inner.multi_modal_projector.requires_grad_(False)
    if model.config.has_gemma_decoder:
        for name, parameter in inner.decoder.named_parameters():
            parameter.requires_grad_(is_inserted(name))
        inner.decoder.embed_tokens.requires_grad_(True)
    return model


def parameter_counts(model: FlorenzForConditionalGeneration) -> dict[str, int]:
    """Parameters by part, tied ones once.

    vision, projector, encoder (with its embedding), decoder (body: layers and positions),
    cross_attention (what is inserted in Gemma layers, else 0), embedding (the decoder's, tied to
    the head); total and trainable (requires_grad).
    """
    inner = model.model
    table = inner.decoder.embed_tokens.weight
    body = [(n, p) for n, p in inner.decoder.named_parameters() if p is not table]
    inserted = [p for n, p in body if model.config.has_gemma_decoder and is_inserted(n)]
    counts = {
        "vision": _size(inner.vision_tower.parameters()),
        "projector": _size(inner.multi_modal_projector.parameters()),
        "encoder": _size(inner.encoder.parameters()),
        "decoder": _size(p for _, p in body) - _size(inserted),
        "cross_attention": _size(inserted),
        "embedding": table.numel(),
    }
    counts["total"] = _size(model.parameters())
    counts["trainable"] = _size(p for p in model.parameters() if p.requires_grad)
    return counts


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
