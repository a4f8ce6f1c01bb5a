"""transformers' pipelines around a patched model: the same texts, batched, with beams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from models import FAMILIES
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperTokenizer,
    pipeline,
)

import fastvlm

SEARCH = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False}
Asks = Callable[[], Any]


def text_generation(folder: Path) -> tuple[Any, Asks]:
    """Gemma-2, three prompts with padding before them."""
    model = FAMILIES["gemma2"].build().eval()
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w3", pad_token="w1", eos_token="w2",
        padding_side="left",
    )  # fmt: skip
    asked = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w6 w7", "w9", "w8 w4 w11 w12 w13"]
    return model, lambda: asked(prompts, batch_size=3, **SEARCH)


def image_text_to_text(folder: Path) -> tuple[Any, Asks]:
    """Florence-2 and its processor, as fastvlm loads them."""
    folder.parent.mkdir()
    config = published.microsoft_config(max_position_embeddings=200)
    torch.manual_seed(0)
    published.write(folder, config, published.weights(config))
    published.write_processor(folder)
    model, processor = fastvlm.load(folder)
    asked = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    chance = np.random.default_rng(0)
    pictures = [
        Image.fromarray(chance.integers(0, 255, (64, 80, 3), dtype=np.uint8)) for _ in range(3)
    ]
    return model, lambda: asked(
        images=pictures, text=["<CAPTION>"] * 3, batch_size=3, generate_kwargs=SEARCH
    )


def speech_recognition(folder: Path) -> tuple[Any, Asks]:
    """Whisper, whose own generate() the pipeline calls."""
    model = FAMILIES["whisper"].build().eval()
    config = model.config
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    features.nb_max_frames = 2 * config.max_source_positions
    features.n_samples = features.hop_length * features.nb_max_frames
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    words = [f"w{i}" for i in range(config.vocab_size - len(marks))] + marks
    tokenizer = WhisperTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[],
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), marks[0]),
    )  # fmt: skip
    asked = pipeline(
        "automatic-speech-recognition", model=model, tokenizer=tokenizer,
        feature_extractor=features, device="cpu",
    )  # fmt: skip
    chance = np.random.default_rng(0)
    sounds = [chance.standard_normal(n).astype(np.float32) for n in (3000, 1200, 3840)]

    def ask() -> Any:
        heard = [{"raw": sound.copy(), "sampling_rate": 16000} for sound in sounds]
        return asked(heard, batch_size=3, generate_kwargs=SEARCH)

    return model, ask


def _first(answer: Any) -> Any:
    return answer[0] if isinstance(answer, list) else answer


@pytest.mark.parametrize("task", [text_generation, image_text_to_text, speech_recognition])
def test_a_pipeline_says_the_same(task: Callable[[Path], tuple[Any, Asks]], tmp_path: Path) -> None:
    model, ask = task(tmp_path / "microsoft" / "Florence-2-base")
    plain = ask()
    fastvlm.patch(model)
    assert ask() == plain
    assert len(plain) == 3
    texts = [str(one.get("generated_text", one.get("text"))) for one in map(_first, plain)]
    assert all(text not in ("", "<CAPTION>") for text in texts), texts
    fastvlm.unpatch(model)
    assert ask() == plain
