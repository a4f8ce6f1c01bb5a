"""What transformers' encoder-decoders make of labels, and what they hand to their decoders.

Right for transformers 5.5 to 5.24.
"""

from __future__ import annotations

from typing import Any

import torch


def targets_of_labels(model: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """The ids that a model's decoder is given where its labels come without; None where the model
    does not tell."""
    names = ("prepare_decoder_input_ids_from_labels", "_shift_right")
    shift = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    return None if shift is None else shift(labels)


def _stands_in(model: Any, *names: str) -> bool:
    """Whether a model's class, or one that it derives from, is of these of transformers.models."""
    homes = [cls.__module__ for cls in type(model).__mro__]
    return any(home.startswith(f"transformers.models.{n}.") for home in homes for n in names)


def hands_to_decoder(model: Any) -> bool:
    """Whether a model of transformers hands its decoder arguments that it does not know itself."""
    if not any(cls.__module__.startswith("transformers.models.") for cls in type(model).__mro__):
        return False
    pairs = ("encoder_decoder", "vision_encoder_decoder", "speech_encoder_decoder")
    return not _stands_in(model, "pix2struct", *pairs)


def mask_of_targets(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """How a model whose labels come without target ids masks those that it makes: bool [B, L], pads
    hidden; None where it does not."""
    begins = _stands_in(model, "pix2struct")
    if not begins and not _stands_in(model, "encoder_decoder"):
        return None
    mask: torch.Tensor = ids != model.config.pad_token_id
    if begins:  # its first token is a pad, and seen
        mask[:, 0] = True
    return mask
