"""Configs of Microsoft's Florence-2 and of the paper's models, and ours that says the same."""

from __future__ import annotations

from typing import Any

from fastvlm.loading.errors import LoadError

# BART's fields, as both configs have them below text_config, with the defaults of their code
TEXT: dict[str, Any] = {
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "classifier_dropout": 0.0,
    "scale_embedding": False,
    "use_cache": True,
    "max_position_embeddings": 1024,
}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
FORCED = {"forced_bos_token_id": None, "forced_eos_token_id": 2}
_VOCABULARY = 51_289

VISION = {  # transformers' name -> theirs
    "depths": "depths",
    "patch_size": "patch_size",
    "patch_stride": "patch_stride",
    "patch_padding": "patch_padding",
    "patch_prenorm": "patch_prenorm",
    "embed_dim": "dim_embed",
    "num_heads": "num_heads",
    "num_groups": "num_groups",
    "window_size": "window_size",
    "drop_path_rate": "drop_path_rate",
    "projection_dim": "projection_dim",
}
FEATURES = ["spatial_avg_pool", "temporal_avg_pool"]
GEMMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_bias",
    "attention_dropout",
    "query_pre_attn_scalar",
    "sliding_window",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)
# the settings of generate() that their configs keep, and what transformers 4 takes for unset
GENERATION: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
# the placeholder of an image to transformers' processor, behind Microsoft's vocabulary;
# and BART's <mask>, which nothing in Florence-2 reads or writes
IMAGE_TOKEN, MASK_TOKEN = 51_289, 50_264

# the paper's code has it written in for the Florence-2 decoder; Gemma's config says the same
FINAL_SOFTCAP = 30.0


def layout_of(config: dict[str, Any]) -> str:
    """ "microsoft", "paper", "florenz" (ours), or "transformers" for all others."""
    kind = config.get("model_type")
    if kind == "florenz":
        return "florenz"
    vision, text = config.get("vision_config"), config.get("text_config")
    if kind == "florence2" and isinstance(vision, dict) and "dim_embed" in vision:
        # only the paper's code writes these, and it writes them always
        names = {**config, **(text if isinstance(text, dict) else {})}
        return "paper" if {"use_encoder_tokenizer", "gemma_config"} & set(names) else "microsoft"
    return "transformers"


def is_tied(config: dict[str, Any]) -> bool:
    """Whether their code would tie the head to the table, going by the config alone."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", True) if isinstance(text, dict) else True
    return bool(config.get("tie_word_embeddings", inner))


def microsoft(where: str, raw: dict[str, Any], tied: bool) -> Any:
    """transformers' Florence2Config for Microsoft's; tied: whether the head is the table.

    LoadError: a part that transformers' Florence-2 does not have.
    """
    from transformers import Florence2Config

    text = _part(where, raw, "text_config")
    vocabulary = text.get("vocab_size", _VOCABULARY)
    ids = {name: text.get(name, default) for name, default in {**IDS, **FORCED}.items()}
    fields = {"model_type": "bart", "vocab_size": vocabulary, **_bart(text), **ids}
    return Florence2Config(
        text_config=fields,
        vision_config=_vision(where, raw),
        image_token_id=image_token(vocabulary),
        tie_word_embeddings=tied,
    )


def image_token(vocabulary: int) -> int:
    """The placeholder of an image in input_ids for a table of so many rows.

    transformers looks placeholders up before it puts the features there, so it must have a row, and
    in Microsoft's 51289 rows the usual one (51289) has none. A row more would be a word more that
    generate() may write; so BART's <mask> stands for an image there.
    """
    if vocabulary > IMAGE_TOKEN:
        return IMAGE_TOKEN
    return min(MASK_TOKEN, vocabulary - 1)


def paper(where: str, raw: dict[str, Any], tied: bool) -> Any:
    """FlorenzConfig for one of the paper's; as ``microsoft``."""
    from fastvlm.florenz import FlorenzConfig

    text = _part(where, raw, "text_config")
    gemma = text.get("gemma_config")
    if not gemma and not text.get("use_encoder_tokenizer"):
        wanted = "text_config.use_encoder_tokenizer must be true, or gemma_config given"
        raise LoadError(where, f"{wanted}; one table for prompts and targets was never published")
    ids = {name: text.get(name, default) for name, default in IDS.items()}
    encoder = {
        "model_type": "bart",
        **_bart(text),
        "vocab_size": text.get("encoder_vocab_size", _VOCABULARY),
        "pad_token_id": text.get("encoder_pad_token_id", 1),
        "bos_token_id": text.get("encoder_bos_token_id", 0),
        "eos_token_id": text.get("encoder_eos_token_id", 2),
        "forced_eos_token_id": None,
    }
    if gemma:
        decoder, cap = _gemma(where, gemma, encoder["d_model"]), gemma["final_logit_softcapping"]
    else:
        vocabulary = text.get("vocab_size", _VOCABULARY)
        decoder = {"model_type": "bart", **_bart(text), "vocab_size": vocabulary, **ids}
        decoder["forced_eos_token_id"] = None  # it is a setting of generate()
        cap = FINAL_SOFTCAP
    return FlorenzConfig(
        vision_config=_vision(where, raw),
        encoder=encoder,
        decoder=decoder,
        # it needs no row here
        image_token_id=min(IMAGE_TOKEN, encoder["vocab_size"]),
        final_logit_softcapping=cap,
        tie_word_embeddings=tied,
        **ids,
    )


def generation(raw: dict[str, Any]) -> Any:
    """The settings of generate() that their code takes from text_config, and from nowhere else."""
    from transformers import GenerationConfig

    text = raw.get("text_config") or {}
    fields = {
        name: text[name]
        for name, unset in GENERATION.items()
        if text.get(name) is not None and text[name] != unset
    }
    ids = {name: text.get(name, default) for name, default in {**IDS, **FORCED}.items()}
    return GenerationConfig(**fields, **{k: v for k, v in ids.items() if v is not None})


def _part(where: str, raw: dict[str, Any], name: str) -> dict[str, Any]:
    part = raw.get(name)
    if not isinstance(part, dict):
        raise LoadError(where, f"config.json must have {name}, an object; got {part!r}")
    return part


def _bart(text: dict[str, Any]) -> dict[str, Any]:
    return {name: text.get(name, default) for name, default in TEXT.items()}


def _vision(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Florence2VisionConfig's fields; LoadError: another tower than DaViT as Florence-2 has it."""
    vision = _part(where, raw, "vision_config")
    missing = [theirs for theirs in VISION.values() if theirs not in vision]
    if missing:
        raise LoadError(where, f"vision_config must have {', '.join(missing)}; it has not")
    # saved by their code it is empty
    kind = vision.get("model_type") or "davit"
    positions = vision.get("image_pos_embed") or {}
    times = vision.get("visual_temporal_embedding") or {}
    features = list(vision.get("image_feature_source") or FEATURES)
    for name, given, wanted in (
        ("model_type", kind, "davit"),
        ("image_pos_embed.type", positions.get("type"), "learned_abs_2d"),
        ("visual_temporal_embedding.type", times.get("type"), "COSINE"),
        ("image_feature_source", features, FEATURES),
    ):
        if given != wanted:
            raise LoadError(where, f"vision_config.{name} must be {wanted!r}; got {given!r}")
    fields = {ours: vision[theirs] for ours, theirs in VISION.items()}
    fields["max_position_embeddings"] = positions["max_pos_embeddings"]
    fields["max_temporal_embeddings"] = times["max_temporal_embeddings"]
    return fields


def _gemma(where: str, gemma: dict[str, Any], width: int) -> dict[str, Any]:
    for name, wanted in (("encoder_hidden_size", width), ("encoder_attn_every_x_layers", 1)):
        given = gemma.get(name, wanted)
        if given != wanted:
            raise LoadError(where, f"gemma_config.{name} must be {wanted}; got {given}")
    missing = [name for name in GEMMA if name not in gemma and name in _GEMMA_NEEDED]
    if missing:
        raise LoadError(where, f"gemma_config must have {', '.join(missing)}; it has not")
    fields = {name: gemma[name] for name in GEMMA if name in gemma}
    theta = gemma.get("rope_theta", 10000.0)
    gemma.setdefault("final_logit_softcapping", FINAL_SOFTCAP)
    return {
        "model_type": "gemma2",
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


_GEMMA_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
