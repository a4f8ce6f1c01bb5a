"""Any of transformers' configurations with the sizes of a toy: by the names that sizes go by."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig

VOCAB, PAD, EOS = 99, 1, 2

_SIZES: dict[Any, tuple[str, ...]] = {
    32: (
        "d_model",
        "decoder_hidden_dim",
        "decoder_hidden_size",
        "dim",
        "emb_dim",
        "embed_dim",
        "embedding_size",
        "encoder_d_model",
        "encoder_hidden_size",
        "hidden_dim",
        "hidden_size",
        "n_embd",
        "projection_dim",
        "word_embed_proj_dim",
    ),
    2: (
        "decoder_layers",
        "decoder_num_hidden_layers",
        "encoder_layers",
        "encoder_num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_hidden_layers",
        "num_layers",
        "speech_encoder_layers",
    ),
    4: (
        "decoder_attention_heads",
        "decoder_num_attention_heads",
        "encoder_attention_heads",
        "encoder_num_attention_heads",
        "n_head",
        "n_heads",
        "num_attention_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
        "num_experts",
        "num_heads",
        "num_local_experts",
        "n_routed_experts",
        "speech_encoder_attention_heads",
    ),
    64: (
        "d_ff",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "encoder_intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "n_inner",
        "speech_encoder_intermediate_size",
    ),
    128: (
        "max_length",
        "max_position_embeddings",
        "max_source_positions",
        "max_target_positions",
        "n_positions",
        "seq_length",
    ),
    0.0: (
        "activation_dropout",
        "activation_function_dropout",
        "adaptor_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "classifier_dropout",
        "decoder_layerdrop",
        "drop_path_rate",
        "dropout",
        "dropout_rate",
        "embd_pdrop",
        "embed_pdrop",
        "embedding_dropout",
        "encoder_layerdrop",
        "feat_proj_dropout",
        "final_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "layer_dropout",
        "layerdrop",
        "mask_feature_prob",
        "mask_time_prob",
        "qkv_dropout",
        "resid_pdrop",
        "residual_dropout",
        "speech_encoder_dropout",
        "speech_encoder_layerdrop",
    ),
}
SMALL: dict[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names},
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "cross_num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_num_key_value_heads", "encoder_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "cross_head_dim"), 16),
    **dict.fromkeys(("forced_eos_token_id", "forced_bos_token_id"), None),
    **dict.fromkeys(("begin_suppress_tokens", "suppress_tokens"), None),
    "bos_token_id": 0,
    "d_kv": 8,
    "decoder_start_token_id": EOS,
    "eos_token_id": EOS,
    "image_size": 32,
    "num_experts_per_tok": 2,
    "num_mel_bins": 8,
    "pad_token_id": PAD,
    "patch_size": 16,
    "query_pre_attn_scalar": 16,
    "scale_embedding": True,
    "sliding_window": 5,
    "vocab_size": VOCAB,
}


def small(config_class: Any, **given: Any) -> Any:
    """A configuration of this class, its parts' too, with what was given over the toy's sizes."""
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    names -= set(getattr(config_class, "attribute_map", {}))
    settings = {name: value for name, value in SMALL.items() if name in names}
    for part, its_class in getattr(config_class, "sub_configs", {}).items():
        if (
            part not in names
            or its_class is AutoConfig
            or not isinstance(given.get(part, {}), dict)
        ):
            continue
        settings[part] = small(its_class, **given.pop(part, {})).to_dict()
    return config_class(**{**settings, **given})
