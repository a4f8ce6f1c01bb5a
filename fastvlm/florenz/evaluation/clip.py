"""CLIPScore (arXiv 2104.08718) by transformers' CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvlm.decoding.pictures import open_picture
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.evaluation.tokens import Missing

_BATCH = 16
_WEIGHT = 2.5


@torch.no_grad()
def mean_clipscore(found: Sequence[Answer], clip: str, device: str) -> float:
    """The mean of 2.5 max(cos(picture, text), 0). clip: an id or a folder.

    Missing: CLIP that does not load, answers whose pictures are no files.
    """
    from transformers import CLIPModel, CLIPProcessor

    if lost := [one.image for one in found if not Path(one.image).is_file()]:
        raise Missing(f"{len(lost)} of {len(found)} pictures are no files here: {lost[0]}")
    try:
        model: Any = CLIPModel.from_pretrained(clip)
        processor: Any = CLIPProcessor.from_pretrained(clip)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise Missing(f"CLIP does not load from {clip} ({why}); --clip names another") from None
    model = model.to(device).eval()
    scores: list[float] = []
    for start in range(0, len(found), _BATCH):
        some = found[start : start + _BATCH]
        inputs = processor(
            text=[one.text for one in some], images=[open_picture(one.image) for one in some],
            return_tensors="pt", padding=True, truncation=True,
        ).to(device)  # fmt: skip
        output = model(**inputs)
        # both are of norm 1
        cosine = (output.image_embeds * output.text_embeds).sum(-1)
        scores += (_WEIGHT * cosine.clamp(min=0)).tolist()
    return sum(scores) / len(scores)
