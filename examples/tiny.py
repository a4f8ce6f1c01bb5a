"""A model and a data set small enough to run the examples anywhere, in seconds.

The model is a Florenz (Florence-2's encoder before Gemma-2 layers with cross-attention) of a few
thousand parameters, patched by fastvlm. It stands where your own model does. For trainers of causal
models there is a Gemma-2 with a tokenizer of sixteen words.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

import fastvlm
from fastvlm.florenz import FlorenzConfig, FlorenzForConditionalGeneration

TASKS = [("caption", "en"), ("caption", "de"), ("translate", "fr")]
VOCABULARY, PIXELS = 32, 64
# the placeholders of an image of 64 pixels: 1 + (64 / 32)^2, with the id behind the vocabulary
IMAGE_TOKENS = {"image_token_id": VOCABULARY, "num_image_tokens": 5}
# nothing is drawn while the model trains, so that runs can be compared
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
SPECIAL_IDS = {"pad_token_id": 1, "decoder_pad_token_id": 0, "decoder_start_token_id": 1}


def samples(count: int = 24) -> list[dict[str, Any]]:
    """Images with one to three targets, as ids."""
    draw = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        targets = [
            {
                "task": task,
                "language": language,
                "prompt_ids": [3, 10 + index],
                "label_ids": [20 + index] * int(torch.randint(3, 12, (), generator=draw)),
            }
            for index, (task, language) in enumerate(TASKS[: 1 + number % 3])
        ]
        pixels = torch.randn(3, PIXELS, PIXELS, generator=draw)
        result.append({"pixel_values": pixels, "image_id": number, "targets": targets})
    return result


def model() -> FlorenzForConditionalGeneration:
    torch.manual_seed(0)
    config = FlorenzConfig.reduced(
        "3.5B", layers=2, width=32, vocab_size=VOCABULARY, encoder_vocab_size=VOCABULARY,
        vision_config={"drop_path_rate": 0.0}, encoder=dict.fromkeys(DROPOUTS, 0.0),
    )  # fmt: skip
    made = FlorenzForConditionalGeneration(config)
    fastvlm.patch(made)
    return made


WORDS = ["<pad>", "<eos>", "<bos>", *"abcdefghijklmnop"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def texts(count: int = 24) -> list[dict[str, str]]:
    """Two letters to be continued by one to six of the alphabet."""
    draw = torch.Generator().manual_seed(0)
    result = []
    for start, length in zip(*torch.randint(1, 7, (2, count), generator=draw).tolist()):
        letters = WORDS[2 + start : 4 + start + length]
        result.append({"prompt": " ".join(letters[:2]), "completion": " " + " ".join(letters[2:])})
    return result


def causal_model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    made = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(WORDS), **sizes, **heads, **ids))
    fastvlm.patch(made)
    return made
