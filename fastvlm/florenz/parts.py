"""A Florenz model from a Florence-2 and, for the larger sizes, a Gemma-2 checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Florence2ForConditionalGeneration, Gemma2ForCausalLM

from fastvlm.checks import fail
from fastvlm.compat.modeling import no_init_weights
from fastvlm.florenz.config import FlorenzConfig, merged
from fastvlm.florenz.freezing import is_inserted
from fastvlm.florenz.model import FlorenzForConditionalGeneration
from fastvlm.florenz.vocabulary import remapped_embedding

_OP = "florenz.from_pretrained_parts"
_STD = 0.02  # of what no checkpoint holds
_HEAD, _TABLE = "lm_head.weight", "model.decoder.embed_tokens.weight"


def from_pretrained_parts(
    florence: Any,
    gemma: Any = None,
    *,
    florence_tokenizer: Any = None,
    gemma_tokenizer: Any = None,
    vocab_size: int = 257_024,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    **overrides: Any,
) -> FlorenzForConditionalGeneration:
    """The model before training: pretrained weights wherever there are any (paper, section 1).

    florence: Florence2ForConditionalGeneration, or a path or hub id of one, of Microsoft's layout
        or transformers'. Gives the vision tower, the projector and the encoder.
    gemma: Gemma2ForCausalLM, or a path or hub id. Gives the decoder; the norm after the inserted
        cross-attention starts as the layer's post_attention_layernorm, its projections as
        N(0, 0.02), its gate as 0, so that the decoder is Gemma's. None: Florence-2's decoder, whose
        vocabulary becomes Gemma's (``remapped_embedding``), for which both tokenizers are needed
        (objects with ``convert_ids_to_tokens`` and ``__call__``, as transformers has them).
    vocab_size: rows of that new embedding, at least len(gemma_tokenizer).
    dtype: of the model; default: that of florence. generator: for the random rows, on the CPU.
    overrides: fields of FlorenzConfig, as in ``FlorenzConfig.of_size``.

    Returns the model in eval mode, on the CPU. ValueError: another kind of checkpoint, a missing
    tokenizer, a Gemma that is not of transformers' layout.
    """
    source = _loaded("florence", florence, Florence2ForConditionalGeneration)
    other = None if gemma is None else _loaded("gemma", gemma, Gemma2ForCausalLM)
    if other is None:
        for name, given in (
            ("florence_tokenizer", florence_tokenizer),
            ("gemma_tokenizer", gemma_tokenizer),
        ):
            if given is None:
                raise fail(_OP, name, "given where gemma is None", None)
    text = source.config.text_config
    decoder = text.to_dict() if other is None else other.config.to_dict()
    if other is None:
        # the ids become Gemma's, as the vocabulary does
        decoder.update(vocab_size=vocab_size, forced_bos_token_id=None, forced_eos_token_id=None)
        decoder["decoder_start_token_id"] = overrides.get("decoder_start_token_id", 1)
    fields = {
        "vision_config": source.config.vision_config.to_dict(),
        "encoder": text.to_dict(),
        "decoder": decoder,
        "image_token_id": source.config.image_token_id,
    }
    config = FlorenzConfig(**merged(fields, overrides))
    inner = source.model
    state = _prefixed("model.vision_tower", inner.vision_tower)
    state |= _prefixed("model.multi_modal_projector", inner.multi_modal_projector)
    state |= _prefixed("model.encoder", inner.language_model.encoder)
    if other is None:
        state |= _prefixed("model.decoder", inner.language_model.decoder)
        state[_TABLE] = remapped_embedding(
            state[_TABLE], florence_tokenizer, gemma_tokenizer, vocab_size, generator=generator
        )
    else:
        state |= _prefixed("model.decoder", other.model)
    with no_init_weights():
        model = FlorenzForConditionalGeneration(config)
    model = model.to(dtype or source.dtype)
    if other is not None:
        state |= _inserted(model, state, generator)
    # one table: the head is tied to it
    model.tie_weights()
    state[_HEAD] = state[_TABLE]
    model.load_state_dict(state)
    return model.eval()


def _loaded(argument: str, given: Any, wanted: type) -> Any:
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        from fastvlm.loading.load import load

        given = load(given).model
    if not isinstance(given, wanted):
        raise fail(_OP, argument, f"a {wanted.__name__}, or a path or hub id of one", type(given))
    return given


def _prefixed(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def _inserted(
    model: FlorenzForConditionalGeneration,
    state: dict[str, Tensor],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Values of the inserted cross-attention by name."""
    values = {}
    for name, parameter in model.named_parameters():
        if not is_inserted(name) or name in state:
            continue
        if name.endswith("encoder_attn_gate"):
            values[name] = torch.zeros(parameter.shape)
        elif "post_encoder_attention_layernorm" in name:
            own = name.replace("post_encoder_attention_layernorm", "post_attention_layernorm")
            values[name] = state[own]
        else:
            values[name] = torch.randn(parameter.shape, generator=generator) * _STD
    return values
