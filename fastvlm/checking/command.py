"""``python -m fastvlm check``: a checkpoint, a photo and prompts through `fastvlm.check`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

import fastvlm
from fastvlm.loading.errors import LoadError, first_line
from fastvlm.loading.load import load
from fastvlm.usage import UsageError

TASKS = ("<CAPTION>", "<MORE_DETAILED_CAPTION>")  # Florence-2's processor spells them out
TEXTS = ("What does the image show?", "Describe it.")
RANDOM_LENGTHS = (12, 7)


def run(args: argparse.Namespace) -> int:
    """With parsed arguments (`fastvlm.checking.arguments`); 0 where nothing differs, else 1."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    if args.small and args.model is not None:
        raise UsageError("--small", "no --model beside it", args.model)
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        if args.text:
            raise UsageError("--text", "--model beside it: random weights know no words", args.text)
        model, inputs = _random(args)
    else:
        model, inputs = _pretrained(args)
    model = model.to(args.device, dtype)
    inputs = {n: _placed(v, args.device, dtype) for n, v in inputs.items()}
    generate: dict[str, Any] = {"max_new_tokens": args.new_tokens, "num_beams": args.beams}
    try:
        result = fastvlm.check(
            model, inputs, generate=generate, train=not args.no_train, exact=args.exact
        )
    except (ValueError, TypeError) as error:  # PatchError among them
        wanted = "a model that fastvlm.check can run"
        raise UsageError("--model", wanted, f"{args.model} ({first_line(error)})") from None
    print(json.dumps(result.as_dict(), indent=1) if args.json else result)
    return result.exit_code


def _placed(value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _random(args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Florence-2-base's shapes, or a tiny model's; two prompts, one of them padded."""
    from fastvlm.loading import random_florence2 as florence2

    photo, _ = florence2.load_photo(args.image)
    model = florence2.random_model(florence2.small() if args.small else florence2.florence2_base())
    size = 96 if args.small else florence2.IMAGE_SIZE
    image_token = model.config.image_token_id
    ids, mask = _random_ids(4, image_token, model.config.text_config.pad_token_id)
    image = torch.full((len(ids), 1 + (size // 32) ** 2), image_token)
    return model, {
        "input_ids": torch.cat([image, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": florence2.to_pixels(photo, size).expand(len(ids), -1, -1, -1).contiguous(),
    }


def _random_ids(
    first: int, last: int, pad: int | None, left: bool = False
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        first, last, (len(RANDOM_LENGTHS), max(RANDOM_LENGTHS)), generator=generator
    )
    mask = (torch.arange(ids.shape[1]) < torch.tensor(RANDOM_LENGTHS)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return ids.masked_fill(mask == 0, pad or 0), mask


def _pretrained(args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    try:
        model, processor = load(args.model, dtype=torch.float32)
    except (LoadError, ImportError) as error:
        reason = error.problem if isinstance(error, LoadError) else first_line(error)
        wanted = "a model id or folder that fastvlm.load takes"
        raise UsageError("--model", wanted, f"{args.model} ({reason})") from None
    if hasattr(processor, "image_processor"):
        return model, _of_image(args, processor)
    if args.image is not None:
        raise UsageError("--image", "a model with an image processor", args.model)
    encodes = model.config.is_encoder_decoder
    if processor is None:
        if args.text:
            raise UsageError("--text", "a model with a tokenizer beside it", args.model)
        if hasattr(model.config, "vision_config"):
            raise UsageError("--model", "a folder with its processor too", args.model)
        last = model.get_input_embeddings().num_embeddings - 1
        ids, mask = _random_ids(min(4, last - 1), last, model.config.pad_token_id, not encodes)
        return model, {"input_ids": ids, "attention_mask": mask}
    if processor.pad_token is None:
        processor.pad_token = processor.eos_token
    processor.padding_side = "right" if encodes else "left"
    found = processor(args.text or list(TEXTS), padding=True, return_tensors="pt")
    return model, {n: v for n, v in found.items() if n != "token_type_ids"}


def _of_image(args: argparse.Namespace, processor: Any) -> dict[str, Tensor]:
    from fastvlm.loading.random_florence2 import load_photo

    photo, _ = load_photo(args.image)
    florence = "florence" in type(processor).__name__.lower()
    texts = args.text or list(TASKS if florence else TEXTS)
    if not florence and "paligemma" in type(processor).__name__.lower():
        texts = [text if "<image>" in text else f"<image>{text}" for text in texts]
    return dict(
        processor(text=texts, images=[photo] * len(texts), padding=True, return_tensors="pt")
    )
