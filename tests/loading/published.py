"""Small checkpoints in the published layouts, made here: config.json, tensors by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

VISION = {
    "model_type": "davit", "drop_path_rate": 0.1, "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True], "enable_checkpoint": False,
    "dim_embed": [8, 16, 16, 24], "num_heads": [1, 2, 2, 3], "num_groups": [1, 2, 2, 3],
    "depths": [1, 1, 2, 1], "window_size": 12, "projection_dim": 16,
    "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 5},
    "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 7},
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
}  # fmt: skip
TEXT = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 40, "dropout": 0.1, "attention_dropout": 0.1,
    "activation_dropout": 0.1, "init_std": 0.02, "scale_embedding": False,
}  # fmt: skip
WORDS = 300  # of the tokenizer below, before Florence-2's 1024
ROWS = WORDS + 1024
GEMMA = {
    "model_type": "gemma2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "query_pre_attn_scalar": 8, "encoder_hidden_size": 16, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "sliding_window": 4096, "rope_theta": 10000.0,
}  # fmt: skip
PAPER_IDS = {
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip


def microsoft_config(**text: Any) -> dict[str, Any]:
    """As Microsoft's repositories have it, with what generate() takes from it."""
    told = {
        "vocab_size": ROWS, "num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True,
        "forced_bos_token_id": 0, "forced_eos_token_id": 2, "normalize_before": False,
    }  # fmt: skip
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {
            "AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"
        },
        "model_type": "florence2",
        "projection_dim": 16,
        "text_config": {**TEXT, **told, **text},
        "vision_config": dict(VISION),
    }


def paper_config(gemma: bool, **text: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "use_encoder_tokenizer": True, "encoder_vocab_size": ROWS, "vocab_size": 50,
        "num_beams": 3, "forced_bos_token_id": None, "forced_eos_token_id": None, **PAPER_IDS,
    }  # fmt: skip
    if gemma:
        told["gemma_config"] = dict(GEMMA)
    return {
        "architectures": [f"Florence{'Gemma2' if gemma else '2'}ForConditionalGeneration"],
        "model_type": "florence2",
        "tie_word_embeddings": True,
        "text_config": {**TEXT, **told, **text},
        "vision_config": {**VISION, "model_type": ""},
    }


def table(config: dict[str, Any]) -> dict[str, list[int]]:
    """Every tensor that the published code has for a config, by its name: written down from that
    code, and not made from ours."""
    vision, text = config["vision_config"], config["text_config"]
    dims, d = vision["dim_embed"], text["d_model"]
    shapes: dict[str, list[int]] = {}

    def layer(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = list(weight)
        if bias:
            shapes[f"{name}.bias"] = [weight[0]]

    for stage, (width, depth) in enumerate(zip(dims, vision["depths"])):
        before = dims[stage - 1] if stage else 3
        side = vision["patch_size"][stage]
        layer(f"vision_tower.convs.{stage}.proj", width, before, side, side)
        layer(
            f"vision_tower.convs.{stage}.norm", before if vision["patch_prenorm"][stage] else width
        )
        for index in range(depth):
            for block, attention in (("spatial", "window"), ("channel", "channel")):
                at = f"vision_tower.blocks.{stage}.{index}.{block}_block"
                layer(f"{at}.conv1.fn.dw", width, 1, 3, 3)
                layer(f"{at}.{attention}_attn.norm", width)
                layer(f"{at}.{attention}_attn.fn.qkv", 3 * width, width)
                layer(f"{at}.{attention}_attn.fn.proj", width, width)
                layer(f"{at}.conv2.fn.dw", width, 1, 3, 3)
                layer(f"{at}.ffn.norm", width)
                layer(f"{at}.ffn.fn.net.fc1", 4 * width, width)
                layer(f"{at}.ffn.fn.net.fc2", width, 4 * width)
    last, places = dims[-1], vision["image_pos_embed"]["max_pos_embeddings"]
    times = vision["visual_temporal_embedding"]["max_temporal_embeddings"]
    shapes["image_projection"] = [last, vision["projection_dim"]]
    layer("image_proj_norm", d)
    layer("image_pos_embed.row_embeddings", places, last // 2, bias=False)
    layer("image_pos_embed.column_embeddings", places, last - last // 2, bias=False)
    shapes["visual_temporal_embed.pos_idx_to_embed"] = [times, last]

    def bart(side: str) -> None:
        at = f"language_model.model.{side}"
        layer(f"{at}.embed_positions", text["max_position_embeddings"] + 2, d, bias=False)
        layer(f"{at}.layernorm_embedding", d)
        for index in range(text[f"{side}_layers"]):
            one = f"{at}.layers.{index}"
            for attention in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    layer(f"{one}.{attention}.{part}", d, d)
                layer(f"{one}.{attention}_layer_norm", d)
            layer(f"{one}.fc1", text[f"{side}_ffn_dim"], d)
            layer(f"{one}.fc2", d, text[f"{side}_ffn_dim"])
            layer(f"{one}.final_layer_norm", d)

    bart("encoder")
    prompts, targets, wide = (
        text.get("encoder_vocab_size", text["vocab_size"]),
        text["vocab_size"],
        d,
    )
    if gemma := text.get("gemma_config"):
        _gemma(layer, shapes, gemma)
        targets, wide = gemma["vocab_size"], gemma["hidden_size"]
    else:
        bart("decoder")
    if "use_encoder_tokenizer" not in text:
        layer("language_model.model.shared", targets, d, bias=False)
        shapes["language_model.final_logits_bias"] = [1, targets]
    layer("language_model.model.encoder.embed_tokens", prompts, d, bias=False)
    layer("language_model.model.decoder.embed_tokens", targets, wide, bias=False)
    layer("language_model.lm_head", targets, wide, bias=False)
    return shapes


def _gemma(layer: Any, shapes: dict[str, list[int]], gemma: dict[str, Any]) -> None:
    h, f = gemma["hidden_size"], gemma["intermediate_size"]
    q = gemma["num_attention_heads"] * gemma["head_dim"]
    kv = gemma["num_key_value_heads"] * gemma["head_dim"]
    at = "language_model.model.decoder"
    for index in range(gemma["num_hidden_layers"]):
        one = f"{at}.layers.{index}"
        for attention, width in (("self_attn", h), ("encoder_attn", gemma["encoder_hidden_size"])):
            layer(f"{one}.{attention}.q_proj", q, h, bias=False)
            layer(f"{one}.{attention}.k_proj", kv, width, bias=False)
            layer(f"{one}.{attention}.v_proj", kv, width, bias=False)
            layer(f"{one}.{attention}.o_proj", h, q, bias=False)
        shapes[f"{one}.encoder_attn_gate"] = [1]
        for part in ("input", "post_attention", "post_encoder_attention"):
            layer(f"{one}.{part}_layernorm", h, bias=False)
        for part in ("pre_feedforward", "post_feedforward"):
            layer(f"{one}.{part}_layernorm", h, bias=False)
        layer(f"{one}.mlp.gate_proj", f, h, bias=False)
        layer(f"{one}.mlp.up_proj", f, h, bias=False)
        layer(f"{one}.mlp.down_proj", h, f, bias=False)
    layer(f"{at}.norm", h, bias=False)


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Values for the table; one tensor for all names of what is tied."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.2 for name, shape in table(config).items()
    }
    head = "language_model.lm_head.weight"
    state[head] = state["language_model.model.decoder.embed_tokens.weight"]
    if (bias := "language_model.final_logits_bias") in state:
        state[bias].zero_()
        for name in ("shared", "encoder.embed_tokens"):
            state[f"language_model.model.{name}.weight"] = state[head]
    return state


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> Path:
    """A folder with config.json and pytorch_model.bin, as Microsoft has it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights(config) if state is None else state, folder / "pytorch_model.bin")
    return folder


def write_safetensors(folder: Path, state: dict[str, Tensor], shards: int) -> None:
    """One file, or shards with their index; what has several names is stored under the first."""
    seen: set[int] = set()
    state = {n: v for n, v in state.items() if not (v.data_ptr() in seen or seen.add(v.data_ptr()))}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        save_file({n: state[n] for n in state if places[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_processor(folder: Path) -> None:
    """What Microsoft's processor reads: BART's kind of tokenizer, CLIP's pictures of 64 pixels."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    known = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"w{i}" for i in range(WORDS - 1 - len(known))] + ["<mask>"]
    words = Tokenizer(BPE({word: i for i, word in enumerate(known)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    words.add_special_tokens([AddedToken(word, special=True) for word in (*special, "<mask>")])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    pictures = {
        "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"},
        "processor_class": "Florence2Processor", "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "size": {"height": 64, "width": 64}, "image_seq_length": 577,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
