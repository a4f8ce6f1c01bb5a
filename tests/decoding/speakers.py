"""Tiny captioners: a model, tokenizers built here, a processor; plain generate() beside them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import small
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

from fastvlm.decoding.languages import LANGUAGES, TASKS
from fastvlm.loading import random_florence2 as florence2

BART = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
SIZE = 64
IMAGE_TOKENS = 1 + (SIZE // 32) ** 2
# 3, 3, 1 and 3 words; the last is not in the table of languages
LANGUAGE_CODES = ["en", "de", "zh", "xx"]
PREFIXES = {"xx": "photo"}
TOPIC = "What does the image describe?"


def tokenizer(
    size: int, special: dict[str, str], image_token: str | None = None
) -> PreTrainedTokenizerFast:
    """Whole words as tokens: those of prompts and prefixes, then w40, w41, … up to size.

    image_token: a special token behind them.
    """
    split = pre_tokenizers.Whitespace()
    texts = [*TASKS.values(), "The target language is.", *(x.prefix for x in LANGUAGES.values())]
    texts += [x.name for x in LANGUAGES.values()]
    words = [word for text in texts for word, _ in split.pre_tokenize_str(text)]
    if special is GEMMA:  # other ids, so that taking the wrong tokenizer shows
        words.reverse()
    # transformers' stop strings try each word behind this one
    known = list(dict.fromkeys([*special.values(), *words, "abcdef"]))
    known += [f"w{index}" for index in range(len(known), size)]
    model = WordLevel({word: i for i, word in enumerate(known[:size])}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = split
    more = {} if image_token is None else {"extra_special_tokens": {"image_token": image_token}}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **more)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_seq_length=IMAGE_TOKENS
    )


def florence2_processor() -> Florence2Processor:
    """transformers' own, whose placeholder is the tiny model's."""
    vocabulary = florence2.small().image_token_id
    words = tokenizer(vocabulary, BART, image_token="<image>")
    return Florence2Processor(image_processor(), words)


@dataclass
class Speaker:
    """A captioner, and the tokenizer of its captions (None: that of its prompts)."""

    model: Any
    processor: Any
    tokenizer: Any

    @property
    def ends(self) -> list[int]:
        """So many end tokens that rows end early, each at another step."""
        return list(range(12, self.model.lm_head.out_features, 3))

    @property
    def words(self) -> Any:
        return self.tokenizer or self.processor.tokenizer

    def begun(self, prefix: str) -> list[int]:
        start = self.model.generation_config.decoder_start_token_id
        ids = self.words(prefix, add_special_tokens=False).input_ids
        return [start, self.words.bos_token_id, *ids]

    def inputs(self, pixels: Tensor, prompt: str) -> dict[str, Tensor]:
        """Of one image, as a processor makes them."""
        words = self.processor.tokenizer
        text = f"{words.bos_token}{prompt}{words.eos_token}"
        ids = words(text, add_special_tokens=False).input_ids
        image = [self.model.config.image_token_id] * IMAGE_TOKENS
        row = torch.tensor([[*image, *ids]])
        return {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "pixel_values": pixels.unsqueeze(0),
        }

    def alone(self, pixels: Tensor, prompt: str, prefix: str, **settings: Any) -> Any:
        """One image, one language, by generate() as it is: its whole output."""
        begun = torch.tensor([self.begun(prefix)])
        return self.model.generate(
            **self.inputs(pixels, prompt),
            decoder_input_ids=begun,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )


def speaker(kind: str) -> Speaker:
    """ "florence2", or "florenz-bart" or "florenz-gemma", tiny, in eval mode."""
    if kind == "florence2":
        # the demo's: its tokens vary, and depend on the image and on positions
        model = florence2.random_model(florence2.small())
        words = tokenizer(model.config.image_token_id, BART)
        processor = SimpleNamespace(image_processor=image_processor(), tokenizer=words)
        return Speaker(model, processor, None)
    model = _talkative(small.build("0.4B" if kind == "florenz-bart" else "3.5B"))
    prompts = tokenizer(small.PROMPT_VOCAB, BART)
    processor = SimpleNamespace(image_processor=image_processor(), tokenizer=prompts)
    return Speaker(model, processor, tokenizer(small.VOCAB, GEMMA))


def _talkative(model: Any) -> Any:
    """Weights with which tokens vary; a tied head otherwise repeats what it reads."""
    generator = torch.Generator().manual_seed(7)
    inner = model.model
    with torch.no_grad():
        for name, module in [*inner.encoder.named_modules(), *inner.decoder.named_modules()]:
            if isinstance(module, torch.nn.Linear):
                gain = 0.7 if name.endswith(("v_proj", "out_proj", "o_proj")) else 2.0
                module.weight.normal_(0, gain * module.in_features**-0.5, generator=generator)
        inner.decoder.embed_tokens.weight.normal_(0, 0.1, generator=generator)
        for layer in inner.decoder.layers:
            if hasattr(layer, "encoder_attn_gate"):
                layer.encoder_attn_gate.fill_(0.7)
    return model


def pixels(count: int) -> Tensor:
    return small.images(count)


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.byte().numpy())
