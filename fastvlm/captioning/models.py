"""What ``python -m fastvlm caption`` runs: real weights, or random ones with invented words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastvlm.loading import random_florence2 as florence2
from fastvlm.loading.errors import LoadError, first_line
from fastvlm.loading.load import load
from fastvlm.loading.processors import square
from fastvlm.usage import UsageError

RANDOM = "The weights are random, so the text means nothing. With --model real weights write it."


@dataclass
class Loaded:
    """Arguments of fastvlm.caption, the model's name, and whether its weights are real.

    id, revision: what a line of the output says of the model; revision None where nothing tells.
    """

    model: Any
    processor: Any
    tokenizer: Any
    name: str
    real: bool
    id: str
    revision: str | None


def pretrained(
    model_id: str,
    tokenizer_id: str | None,
    device: str,
    dtype: torch.dtype = torch.float32,
    processor_id: str | None = None,
    image_size: int | None = None,
) -> Loaded:
    """A Florence-2 or Florenz checkpoint of any layout; UsageError where it does not load.

    image_size: as `fastvlm.load` takes it.
    """
    wanted = "a Florence-2 or Florenz model id or folder"
    try:
        found = load(
            model_id, dtype=dtype, processor=processor_id, tokenizer=tokenizer_id,
            image_size=image_size,
        )  # fmt: skip
    except (LoadError, ImportError) as error:
        reason = error.problem if isinstance(error, LoadError) else first_line(error)
        raise UsageError("--model", wanted, f"{model_id} ({reason})") from None
    kind = found.model.config.model_type
    if kind not in ("florence2", "florenz"):
        raise UsageError("--model", wanted, f"{model_id}, a {kind}")
    if tokenizer_id is not None and kind != "florenz":
        raise UsageError("--tokenizer", "a Florenz model beside it", tokenizer_id)
    if found.processor is None:
        raise UsageError("--processor", "one, as none lies beside the model", "none")
    if found.tokenizer is None and kind == "florenz":
        raise UsageError("--tokenizer", "one, as none lies beside the model", "none")
    model = found.model.to(device)
    name = Path(model_id).name
    # of a hub's checkpoint the commit; a folder has none
    return Loaded(model, found.processor, found.tokenizer, name, True, model_id, found.commit)


def random(small: bool, device: str, dtype: torch.dtype = torch.float32) -> Loaded:
    """Florence-2-base's shapes, or a tiny model's; the words for its tokens are made up."""
    config = florence2.small() if small else florence2.florence2_base()
    model = florence2.random_model(config).to(device, dtype)
    # the image's placeholder comes behind all words, as in the model
    placeholder = {"image_token": "<image>"}
    words = invented_tokenizer(model.config.image_token_id, extra_special_tokens=placeholder)
    processor = square(words, 96 if small else florence2.IMAGE_SIZE)
    name = "a tiny Florence-2" if small else "Florence-2-base"
    return Loaded(model, processor, None, name, False, f"{name}, random", f"seed {florence2.SEED}")


def invented_tokenizer(size: int, **more: Any) -> Any:
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
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **more)
