"""The four published sizes as fields of FlorenzConfig (arXiv 2503.09443, section 1)."""

from __future__ import annotations

import copy
from typing import Any


def _vision(first: int, width: int) -> dict[str, Any]:
    dims = [first, 2 * first, 4 * first, 8 * first]
    heads = [d // 32 for d in dims]
    return {
        "depths": [1, 1, 9, 1],
        "embed_dim": dims,
        "num_heads": heads,
        "num_groups": heads,
        "projection_dim": width,
        "drop_path_rate": 0.1,
    }


def _bart(width: int, layers: int, positions: int, vocabulary: int, **ids: Any) -> dict[str, Any]:
    return {
        "model_type": "bart",
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": width // 64,
        "decoder_attention_heads": width // 64,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "forced_eos_token_id": None,
        **ids,
    }


def _gemma(width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 256,
        # 9B as well, where an old conversion of its weights says 224
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "vocab_size": 256_000,
    }


# Gemma's ids for the decoder that takes its tokenizer; its start is its end of sequence
_IDS = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _florence_decoder(width: int, layers: int, positions: int) -> dict[str, Any]:
    return {
        "vision_config": _vision(width // 6 if width == 768 else width // 4, width),
        "encoder": _bart(width, layers, positions, 51_328),
        "decoder": _bart(width, layers, positions, 257_024, **_IDS),
    }


def _gemma_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": _vision(256, 1024),
        "encoder": _bart(1024, 12, 4096, 51_289),
        "decoder": decoder,
    }


SIZES: dict[str, dict[str, Any]] = {
    "0.4B": _florence_decoder(768, 6, 1024),
    "1.0B": _florence_decoder(1024, 12, 4096),
    "3.5B": _gemma_decoder(_gemma(2304, 26, 8, 9216)),
    "11.2B": _gemma_decoder(_gemma(3584, 42, 16, 14336)),
}


def reduced_size(
    fields: dict[str, Any],
    layers: int,
    width: int,
    vocab_size: int | None,
    encoder_vocab_size: int | None,
) -> dict[str, Any]:
    """The same structure with the encoder ``width`` wide; all widths keep their ratio to it."""
    small = copy.deepcopy(fields)
    vision, encoder, decoder = (small[name] for name in ("vision_config", "encoder", "decoder"))
    full = encoder["d_model"]

    def scaled(size: int, multiple: int) -> int:
        return max(multiple, round(size * width / full / multiple) * multiple)

    # heads of 32 where there are two or more, one head otherwise
    dims = [scaled(d, 32 if scaled(d, 8) >= 64 else 8) for d in vision["embed_dim"]]
    heads = [max(1, d // 32) for d in dims]
    depths = [min(d, layers) for d in vision["depths"]]
    vision.update(embed_dim=dims, num_heads=heads, num_groups=heads, depths=depths)
    vision["projection_dim"] = width
    for part in (encoder, decoder):
        if part["model_type"] == "bart":
            _reduce_bart(part, layers, width)
        else:
            _reduce_gemma(part, layers, scaled)
    if vocab_size is not None:
        decoder["vocab_size"] = vocab_size
    if encoder_vocab_size is not None:
        encoder["vocab_size"] = encoder_vocab_size
        small["image_token_id"] = encoder_vocab_size
    return small


def _reduce_bart(part: dict[str, Any], layers: int, width: int) -> None:
    heads = max(n for n in range(1, max(2, width // 64) + 1) if width % n == 0)
    part.update(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )


def _reduce_gemma(part: dict[str, Any], layers: int, scaled: Any) -> None:
    """Two query heads to a key head, as wide as published where four of them fill the layer."""
    hidden = scaled(part["hidden_size"], 16)
    head_dim = min(256, max(16, hidden // 4 // 16 * 16))
    heads = max(4, scaled(part["num_attention_heads"], 4))
    while hidden % heads:  # transformers asks for it
        heads -= 2
    part.update(
        hidden_size=hidden,
        intermediate_size=scaled(part["intermediate_size"], 16),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
    )
