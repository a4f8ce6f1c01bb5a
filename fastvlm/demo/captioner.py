"""What ``python -m fastvlm caption`` runs: real weights, or random ones with invented words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastvlm.demo import workload
from fastvlm.demo.arguments import UsageError


@dataclass
class Captioner:
    """Arguments of fastvlm.caption, the model's name, and whether its weights are real."""

    model: Any
    processor: Any
    tokenizer: Any
    name: str
    real: bool


def pretrained(model_id: str, tokenizer_id: str | None, device: str) -> Captioner:
    """A Florence-2 or Florenz checkpoint with its processor; UsageError where it does not load."""
    from transformers import PreTrainedConfig

    try:
        kind = PreTrainedConfig.get_config_dict(model_id)[0].get("model_type")
        load = _florenz if kind == "florenz" else _florence2
        model, processor, tokenizer = load(model_id, tokenizer_id)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        wanted = "a Florence-2 or Florenz model id or folder, with its processor"
        raise UsageError("--model", wanted, f"{model_id} ({reason})") from None
    return Captioner(model.eval().to(device), processor, tokenizer, Path(model_id).name, True)


def _florence2(model_id: str, tokenizer_id: str | None) -> tuple[Any, Any, Any]:
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    if tokenizer_id is not None:
        raise UsageError("--tokenizer", "a Florenz model beside it", tokenizer_id)
    processor = AutoProcessor.from_pretrained(model_id)
    return (
        Florence2ForConditionalGeneration.from_pretrained(model_id, dtype=torch.float32),
        processor,
        None,
    )


def _florenz(model_id: str, tokenizer_id: str | None) -> tuple[Any, Any, Any]:
    from transformers import AutoTokenizer, Florence2Processor

    from fastvlm.florenz import FlorenzForConditionalGeneration

    model = FlorenzForConditionalGeneration.from_pretrained(model_id, dtype=torch.float32)
    processor = Florence2Processor.from_pretrained(model_id)
    if tokenizer_id is None:
        tokenizer = AutoTokenizer.from_pretrained(model_id, subfolder="decoder_tokenizer")
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_id)
    return model, processor, tokenizer


def random(small: bool, device: str) -> Captioner:
    """Florence-2-base's shapes, or a tiny model's; the words for its tokens are made up."""
    config = workload.small() if small else workload.florence2_base()
    model = workload.random_model(config).to(device)
    words = invented_tokenizer(model.config.image_token_id)
    processor = _Processor(words, 96 if small else workload.IMAGE_SIZE)
    name = "a tiny Florence-2" if small else "Florence-2-base"
    return Captioner(model, processor, None, name, False)


class _Processor:
    """The two parts of Florence-2's processor that fastvlm.caption asks for."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size

    def image_processor(self, images: list[Image.Image], return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([workload.to_pixels(i, self.size) for i in images])}


def invented_tokenizer(size: int) -> Any:
    """BART's special tokens, the 256 bytes, which spell any text, and made-up words up to size.

    ValueError: a size below 260.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    known = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if size < len(known):
        raise ValueError(f"fastvlm: size must be {len(known)} or more; got {size}")
    syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
    # byte-level tokens of words begin with the sign that stands for a space
    words = ("Ġ" + "".join(parts) for n in (2, 3) for parts in product(syllables, repeat=n))
    known += [next(words) for _ in range(size - len(known))]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(known)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
