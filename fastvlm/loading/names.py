"""What Microsoft's code calls the tensors of Florence-2, and the paper's those of its models.

Both store the vision tower and the projector under the names of Microsoft's code. The projection
is a bare parameter [D_v, d] there, multiplied from the right, where transformers has a Linear.
"""

from __future__ import annotations

import re

HEAD = "language_model.lm_head.weight"
SHARED = "language_model.model.shared.weight"
ENCODER_TABLE = "language_model.model.encoder.embed_tokens.weight"
DECODER_TABLE = "language_model.model.decoder.embed_tokens.weight"
LOGITS_BIAS = "language_model.final_logits_bias"
PROJECTION = "image_projection"

_BLOCK = r"^model\.vision_tower\.blocks\.(\d+)\.(\d+)\.(spatial|channel)_block\."
_THEIRS = r"vision_tower.blocks.\1.\2.\3_block."
_PROJECTOR = r"^model\.multi_modal_projector\."
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), form)
    for pattern, form in (
        (r"^model\.vision_tower\.convs\.(\d+)\.conv\.", r"vision_tower.convs.\1.proj."),
        (r"^model\.vision_tower\.convs\.", "vision_tower.convs."),
        (_BLOCK + r"conv([12])\.", _THEIRS + r"conv\4.fn.dw."),
        (_BLOCK.replace("spatial|channel", "spatial") + r"norm1\.", _THEIRS + "window_attn.norm."),
        (_BLOCK.replace("spatial|channel", "channel") + r"norm1\.", _THEIRS + "channel_attn.norm."),
        (_BLOCK + r"(window|channel)_attn\.", _THEIRS + r"\4_attn.fn."),
        (_BLOCK + r"norm2\.", _THEIRS + "ffn.norm."),
        (_BLOCK + r"ffn\.", _THEIRS + "ffn.fn.net."),
        (_PROJECTOR + r"image_projection\.weight$", PROJECTION),
        (_PROJECTOR + r"image_position_embed\.", "image_pos_embed."),
        (_PROJECTOR, ""),
        # transformers' Florence-2 has one language model, fastvlm.florenz its two halves
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(encoder|decoder)\.", r"language_model.model.\1."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
)


def published(name: str) -> str:
    """The published name of a tensor of Florence2- or FlorenzForConditionalGeneration."""
    for pattern, form in _RULES:
        theirs, count = pattern.subn(form, name)
        if count:
            return theirs
    raise KeyError(name)
