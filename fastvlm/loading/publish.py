"""config.json of a published layout for a model of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastvlm.loading import configs

# where Microsoft's code lies for those who let it run; it is the same for all its sizes
_CODE = "microsoft/Florence-2-large--"
AUTO_MAP = {
    "AutoConfig": f"{_CODE}configuration_florence2.Florence2Config",
    "AutoModelForCausalLM": f"{_CODE}modeling_florence2.Florence2ForConditionalGeneration",
}
_OWN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_ONLY_OURS = ("qkv_bias", "mlp_ratio", "in_channels", "activation_function")


def published(layout: str, config: Any, settings: Any) -> dict[str, Any]:
    """What config.json says of a model of this config; settings: those of its generate().

    ValueError: something that the published code has no place for, by name.
    """
    if layout == "paper":
        raw = _paper(config, settings)
        again = configs.paper("config.json", raw, config.tie_word_embeddings)
    else:
        raw = _microsoft(config, settings)
        again = configs.microsoft("config.json", raw, config.tie_word_embeddings)
    for name, ours, theirs in _differences(layout, config, again):
        wanted = f"{theirs!r}, which is all that the published code knows"
        raise ValueError(f"fastvlm.save_published: config.{name} must be {wanted}; got {ours!r}")
    return raw


def _microsoft(config: Any, settings: Any) -> dict[str, Any]:
    text = config.text_config
    fields = {name: getattr(text, name) for name in configs.TEXT}
    fields |= {"vocab_size": text.vocab_size, **_settings(settings, text)}
    raw = _outer(config, fields)
    return {**raw, "auto_map": AUTO_MAP}


def _paper(config: Any, settings: Any) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    fields = {name: getattr(encoder, name) for name in configs.TEXT}
    fields |= {
        "use_encoder_tokenizer": True,
        "encoder_vocab_size": encoder.vocab_size,
        **{f"encoder_{name}": getattr(encoder, name) for name in _OWN_IDS},
        "vocab_size": decoder.vocab_size,
        **_settings(settings, config),
    }
    if config.has_gemma_decoder:
        gemma = {name: getattr(decoder, name) for name in (*configs.GEMMA, *_OWN_IDS)}
        fields["gemma_config"] = {
            **gemma,
            # theirs would choose sdpa on transformers 4.48, which leaves out the softcap of scores
            "_attn_implementation": "eager",
            "_attn_implementation_autoset": False,
            "model_type": "gemma2",
            "rope_theta": (decoder.rope_parameters or {}).get("rope_theta", 10000.0),
            "encoder_hidden_size": encoder.d_model,
            "encoder_attn_every_x_layers": 1,
        }
    else:
        sides = [name for name in configs.TEXT if name.startswith("decoder_")]
        fields |= {name: getattr(decoder, name) for name in sides}
    return _outer(config, fields)


def _outer(config: Any, text: dict[str, Any]) -> dict[str, Any]:
    vision = config.vision_config
    fields = {theirs: getattr(vision, ours) for ours, theirs in configs.VISION.items()}
    ids = {name: text[name] for name in _OWN_IDS}
    return {
        "model_type": "florence2",
        "is_encoder_decoder": True,
        "ignore_index": -100,
        "projection_dim": vision.projection_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": text["vocab_size"],
        **ids,
        "text_config": text,
        "vision_config": {
            "model_type": "davit",
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
            "enable_checkpoint": False,
            "image_feature_source": list(configs.FEATURES),
            "image_pos_embed": {
                "type": "learned_abs_2d",
                "max_pos_embeddings": vision.max_position_embeddings,
            },
            "visual_temporal_embedding": {
                "type": "COSINE",
                "max_temporal_embeddings": vision.max_temporal_embeddings,
            },
        },
    }


def _settings(settings: Any, ids: Any) -> dict[str, Any]:
    """Of generate(); ids: a config with those that the settings leave open."""
    told = {name: getattr(settings, name, None) for name in configs.GENERATION}
    told = {name: value for name, value in told.items() if value is not None}
    for name in configs.IDS:
        value = getattr(settings, name, None)
        told[name] = getattr(ids, name) if value is None else value
    return {**told, **{name: getattr(settings, name, None) for name in configs.FORCED}}


def _differences(layout: str, config: Any, again: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields by which two configs make models that compute other things: name, ours, theirs."""
    positions = ("max_position_embeddings", "max_temporal_embeddings")
    parts = {"vision_config": (*configs.VISION, *positions, *_ONLY_OURS)}
    if layout == "microsoft":
        parts["text_config"] = (*configs.TEXT, "model_type")
    elif config.has_gemma_decoder:
        parts["encoder"] = tuple(n for n in configs.TEXT if not n.startswith("decoder_"))
        parts["decoder"] = (*configs.GEMMA, "layer_types", "rope_parameters")
    else:
        parts["encoder"] = tuple(n for n in configs.TEXT if not n.startswith("decoder_"))
        parts["decoder"] = tuple(n for n in configs.TEXT if not n.startswith("encoder_"))
    for part, names in parts.items():
        for name in names:
            ours, theirs = (getattr(getattr(one, part), name) for one in (config, again))
            if _plain(ours) != _plain(theirs):
                yield f"{part}.{name}", ours, theirs
    if layout == "paper" and config.final_logit_softcapping != again.final_logit_softcapping:
        name = "final_logit_softcapping"
        yield name, config.final_logit_softcapping, again.final_logit_softcapping


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
