"""CTranslate2 with a model's own weights in float32, optional: without it the side is left out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure

NAME = "ctranslate2"
LOADERS = {"t5": "T5Loader", "m2m_100": "M2M100Loader", "whisper": "WhisperLoader"}


def available() -> bool:
    if importlib.util.find_spec(NAME) is None:
        measure.MISSING[NAME] = f"{NAME}: not installed"
        return False
    return True


def version() -> dict[str, str]:
    if importlib.util.find_spec(NAME) is None:
        return {NAME: "not installed"}
    return {NAME: importlib.metadata.version(NAME)}


def _save(model: Any, folder: Path) -> None:
    from ctranslate2.converters import transformers as converters

    kind = model.config.model_type
    loader = getattr(converters, LOADERS[kind])()
    with torch.no_grad():
        spec = loader.get_model_spec(model)
        # tokens by their numbers: nothing here is a word
        words = [str(i) for i in range(model.config.vocab_size)]
        end, padding = str(_end(model)), str(model.config.pad_token_id)
        if kind == "whisper":
            # those behind the last of these would be timestamps, with rules of their own
            words[model.config.decoder_start_token_id] = "<|startoftranscript|>"
            words[_end(model)], words[-1] = "<|endoftext|>", "<|notimestamps|>"
            spec.config.suppress_ids = spec.config.suppress_ids_begin = []
            spec.config.lang_ids, spec.config.alignment_heads = [], [(0, 0)]
        else:
            spec.config.bos_token = spec.config.unk_token = padding
            spec.config.eos_token = end
            spec.config.decoder_start_token = str(model.config.decoder_start_token_id)
        loader.set_vocabulary(spec, words)
        spec.validate()
        spec.optimize()
        spec.save(str(folder))


def _end(model: Any) -> int:
    """The model's own end token; generation_config has none here."""
    end: int = model.config.eos_token_id
    return end


def whisper_prompt(model: Any) -> list[int]:
    """The start, and that no times are asked for."""
    return [model.config.decoder_start_token_id, model.config.vocab_size - 1]


class Translator:
    """Text to text: beams of a fixed number of tokens."""

    def __init__(self, model: Any) -> None:
        import ctranslate2

        with tempfile.TemporaryDirectory() as folder:
            _save(model, Path(folder))
            self.model = ctranslate2.Translator(
                folder, intra_threads=torch.get_num_threads(), compute_type="float32"
            )

    def __call__(self, source: list[list[int]], beams: int, tokens: int) -> Tensor:
        found = self.model.translate_batch(
            [[str(i) for i in row] for row in source],
            beam_size=beams,
            max_decoding_length=tokens,
            min_decoding_length=tokens,
            max_input_length=0,
        )
        return torch.tensor([[int(token) for token in row.hypotheses[0]] for row in found])


class Whisper:
    """Frames to text: as `Translator`."""

    def __init__(self, model: Any) -> None:
        import ctranslate2

        self.end, self.prompt = _end(model), whisper_prompt(model)
        with tempfile.TemporaryDirectory() as folder:
            _save(model, Path(folder))
            self.model = ctranslate2.models.Whisper(
                folder, intra_threads=torch.get_num_threads(), compute_type="float32"
            )

    def states(self, frames: Tensor) -> Any:
        """The encoder's states, which `__call__` takes as well as frames."""
        import ctranslate2

        view = ctranslate2.StorageView.from_array(frames.contiguous().numpy())
        return self.model.encode(view, to_cpu=True)

    def __call__(self, states: Any, beams: int, tokens: int) -> Tensor:
        # it writes half of its length, as the published Whisper does
        found = self.model.generate(
            states,
            [self.prompt],
            beam_size=beams,
            max_length=2 * max(tokens, len(self.prompt)),
            suppress_tokens=[self.end],
            suppress_blank=False,
        )
        return torch.tensor([row.sequences_ids[0] for row in found])
