"""FlorenzConfig: the three parts of a Florenz model, the four published sizes, and small ones."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Florence2VisionConfig, PreTrainedConfig

from fastvlm.checks import choice, fail
from fastvlm.florenz.sizes import SIZES, reduced_size

_OP = "florenz.FlorenzConfig"


@strict
class FlorenzConfig(PreTrainedConfig):
    """Florence-2's image and text encoder before a BART or a Gemma-2 decoder (arXiv 2503.09443).

    vision_config: Florence2VisionConfig; its projection_dim is the encoder's d_model.
    encoder: BartConfig of the text encoder (d_model, encoder_layers, vocabulary of the prompts).
    decoder: BartConfig of the same d_model (the native Florence-2 decoder), or Gemma2Config, in
        which every layer gets a gated cross-attention. Its vocabulary is that of the targets.
    image_token_id: placeholder in the encoder's input_ids. It needs no row in the embedding.
    final_logit_softcapping: logits are cap * tanh(logits / cap), with both decoders; None: not.
    pad, eos, bos and decoder_start ids are the decoder's (Gemma's tokenizer: 0, 1, 2 and 1).

    ValueError: parts of other kinds, or whose widths do not fit together.
    """

    model_type = "florenz"
    # a list, to which Trainer adds others
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    sub_configs = {  # noqa: RUF012 (as transformers declares it)
        "vision_config": Florence2VisionConfig,
        "encoder": AutoConfig,
        "decoder": AutoConfig,
    }

    vision_config: Any = None
    encoder: Any = None
    decoder: Any = None
    image_token_id: int = 51289
    final_logit_softcapping: float | int | None = 30.0
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            setattr(self, name, _part(name, getattr(self, name)))
        super().__post_init__(**kwargs)
        vision, encoder, decoder = self.vision_config, self.encoder, self.decoder
        choice(_OP, "encoder.model_type", encoder.model_type, ("bart",))
        choice(_OP, "decoder.model_type", decoder.model_type, ("bart", "gemma2"))
        width = encoder.d_model
        if vision.projection_dim != width:
            wanted = f"the encoder's d_model, {width}"
            raise fail(_OP, "vision_config.projection_dim", wanted, vision.projection_dim)
        if self.has_gemma_decoder:
            decoder.cross_attention_hidden_size = width
        elif decoder.d_model != width:
            raise fail(_OP, "decoder.d_model", f"the encoder's d_model, {width}", decoder.d_model)
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            setattr(decoder, name, getattr(self, name))

    @property
    def has_gemma_decoder(self) -> bool:
        """Whether the decoder is Gemma-2 with inserted cross-attention."""
        return bool(self.decoder.model_type == "gemma2")

    @classmethod
    def of_size(cls, size: str, **overrides: Any) -> FlorenzConfig:
        """One of the published sizes: "0.4B", "1.0B", "3.5B" or "11.2B" (paper, section 1).

        overrides: fields of this config; a dict for vision_config, encoder or decoder changes
        those of its fields that it names. ValueError: another size.
        """
        choice(f"{_OP}.of_size", "size", size, tuple(SIZES))
        return cls(**merged(SIZES[size], overrides))

    @classmethod
    def reduced(
        cls,
        size: str,
        *,
        layers: int = 2,
        width: int = 64,
        vocab_size: int | None = None,
        encoder_vocab_size: int | None = None,
        **overrides: Any,
    ) -> FlorenzConfig:
        """The structure of a published size in a depth and width that tests can afford.

        layers: of the encoder and of the decoder, and at most of the long vision stage.
        width: d_model of the encoder, a multiple of 16; all other widths keep their ratio to it, up
        to rounding, and heads their width as long as there are two of them.
        vocab_size, encoder_vocab_size: of the decoder and of the encoder; default: as published.
        overrides: as in ``of_size``. ValueError: another size, or numbers that are too small.
        """
        op = f"{_OP}.reduced"
        choice(op, "size", size, tuple(SIZES))
        if not isinstance(layers, int) or layers < 1:
            raise fail(op, "layers", "a whole number, 1 or more", layers)
        if not isinstance(width, int) or width < 16 or width % 16:
            raise fail(op, "width", "a multiple of 16", width)
        small = reduced_size(SIZES[size], layers, width, vocab_size, encoder_vocab_size)
        return cls(**merged(small, overrides))


def _part(name: str, given: Any) -> Any:
    """The config of a part from a config, a dict of its fields (BART's without model_type), or
    None for the default."""
    if given is not None and not isinstance(given, dict):
        return given
    fields = dict(given or {})
    if name == "vision_config":
        return Florence2VisionConfig(**fields)
    kind = fields.pop("model_type", "bart")
    return AutoConfig.for_model(kind, **fields)


def merged(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """fields with overrides; of a part given as a dict only the fields that it names change."""
    fields = copy.deepcopy(fields)
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            fields[name].update(value)
        else:
            fields[name] = value
    return fields
