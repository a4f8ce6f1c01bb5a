"""What is timed: a decoding step behind an encoder that has run, whole calls, a step of training.

Each work gives its sides by name: functions that take a number of tokens (None for a step of
training) and give what they computed. All sides of a work read the same weights.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from benchmarks.families import shapes, translator

BASE, OURS, ENGINE = "transformers", "fastvlm", translator.NAME
Side = Callable[[int], Tensor]
# the keys and values of what is read across, projected once for a text and not in each step
ACROSS = (
    *("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v"),
    *("crossattention.self.key", "crossattention.self.value"),
    *("cross_attn.k_proj", "cross_attn.v_proj"),
)


@dataclass(frozen=True)
class Made:
    """sides by name; step_bytes: what a step has to read at least, None where no step is timed."""

    sides: dict[str, Side]
    step_bytes: int | None = None


def step_bytes(keys: int, *parts: nn.Module) -> int:
    """Of the weights of a decoder and its head, each read once, and of the keys and values of one
    text's source."""
    read, across = {}, 0
    for name, module in (named for part in parts for named in part.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ACROSS):
            across += module.out_features
        elif isinstance(module, nn.Linear):
            read[id(module.weight)] = module.weight.numel()
    return 4 * (sum(read.values()) + keys * across)


@dataclass(frozen=True)
class Work:
    """tokens: of a short and a long call, whose difference by the tokens between them is a step;
    the same number twice: the whole call is timed. least: times faster than each, as asked for.

    make: of tiny shapes or true ones.
    """

    name: str
    make: Callable[[bool], Made]
    tokens: tuple[int, int]
    least: dict[str, float]


def same_parameters(model: Any) -> Any:
    """A model of its own, to be patched alone, over the same tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def both(model: Any) -> dict[str, Any]:
    ours = same_parameters(model)
    fastvlm.patch(ours)
    return {BASE: model, OURS: ours}


def written(model: Any, beams: int, inputs: dict[str, Any], tokens: int) -> Tensor:
    # made anew: generate() repeats the states in it for the beams
    if "states" in inputs:
        inputs = {**inputs, "encoder_outputs": BaseModelOutput(inputs["states"])}
        del inputs["states"]
    found: Tensor = model.generate(
        **inputs, num_beams=beams, do_sample=False, max_new_tokens=tokens, min_new_tokens=None
    )
    return found[:, -tokens:]


def generating(models: dict[str, Any], beams: int, inputs: dict[str, Any]) -> dict[str, Side]:
    return {
        name: functools.partial(written, model, beams, inputs) for name, model in models.items()
    }


def whisper_step(tiny: bool) -> Made:
    beams, model = 5, shapes.built(shapes.whisper_small, tiny)
    frames = torch.randn(1, 80, 2 * model.config.max_source_positions)
    with torch.no_grad():
        states = model.model.encoder(frames).last_hidden_state
    prompt = torch.tensor([translator.whisper_prompt(model)])
    sides = generating(both(model), beams, {"states": states, "decoder_input_ids": prompt})
    if translator.available():
        engine = translator.Whisper(model)
        sides[ENGINE] = functools.partial(engine, engine.states(frames), beams)
    return Made(sides, step_bytes(states.shape[1], model.model.decoder, model.proj_out))


def _tokens(vocabulary: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Padded rows of token ids and their mask; neither padding nor an end among them."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, vocabulary, mask.shape)
    return ids, mask.long()


def _translated(model: Any, beams: int, lengths: list[int], encoded: bool) -> Made:
    """encoded: the states are there; otherwise each call encodes, as CTranslate2's always does."""
    ids, mask = _tokens(model.config.vocab_size, lengths)
    inputs: dict[str, Any] = {"attention_mask": mask}
    if encoded:
        with torch.no_grad():
            inputs["states"] = model.get_encoder()(ids, attention_mask=mask).last_hidden_state
    else:
        inputs["input_ids"] = ids.masked_fill(mask == 0, model.config.pad_token_id)
    sides = generating(both(model), beams, inputs)
    if translator.available():
        source = [row[:length].tolist() for row, length in zip(ids, lengths)]
        engine = translator.Translator(model)
        sides[ENGINE] = functools.partial(engine, source, beams)
    least = step_bytes(sum(lengths), model.get_decoder(), model.lm_head) if encoded else None
    return Made(sides, least)


def t5_step(tiny: bool) -> Made:
    model = shapes.built(shapes.flan_t5_base, tiny)
    return _translated(model, 4, [24 if tiny else 512], encoded=True)


def nllb_call(tiny: bool) -> Made:
    model = shapes.built(shapes.nllb_600m, tiny)
    lengths = [3, 7] if tiny else [20, 26, 31, 37, 43, 48, 54, 60]
    return _translated(model, 4, lengths, encoded=False)


def donut_step(tiny: bool) -> Made:
    model = shapes.built(shapes.donut_base, tiny)
    keys = 48 if tiny else 4800
    states = torch.randn(1, keys, model.config.encoder.hidden_size)
    sides = generating(both(model), 1, {"states": states})
    return Made(sides, step_bytes(keys, model.decoder))


def blip_step(tiny: bool) -> Made:
    model = shapes.built(shapes.blip_base, tiny)
    texts, keys = model.config.text_config, 20 if tiny else 577
    states = torch.randn(1, keys, texts.encoder_hidden_size)
    inputs = {
        "input_ids": torch.tensor([[texts.bos_token_id]]),
        "encoder_hidden_states": states,
        "encoder_attention_mask": torch.ones(1, keys, dtype=torch.long),
    }
    decoders = {name: side.text_decoder for name, side in both(model).items()}
    return Made(generating(decoders, 3, inputs), step_bytes(keys, model.text_decoder))


def mllama_step(tiny: bool) -> Made:
    """A picture of four tiles, which all tokens behind the first see."""
    model = shapes.built(shapes.mllama, tiny)
    ids, mask = _tokens(model.config.text_config.vocab_size, [6 if tiny else 16])
    sees = torch.ones(1, ids.shape[1], 1, 4, dtype=torch.long)
    sees[:, 0] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.zeros(1, 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": sees,
    }
    keys = 4 * model.model.vision_model.num_patches
    least = step_bytes(keys, model.model.language_model, model.lm_head)
    return Made(generating(both(model), 4, inputs), least)


def _labels(vocabulary: int, lengths: list[int]) -> Tensor:
    ids, mask = _tokens(vocabulary, lengths)
    return ids.masked_fill(mask == 0, -100)


def _lengths(draw: random.Random, rows: int, least: int, most: int) -> list[int]:
    """The longest is among them, as in a corpus."""
    return [most, *(draw.randint(least, most) for _ in range(rows - 1))]


def trained(model: nn.Module, inputs: dict[str, Tensor], _: int) -> Tensor:
    """A step of training without its optimizer: the loss, all gradients made."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(**inputs).loss
    loss.backward()
    return loss.detach()[None]


def _training(model: Any, inputs: dict[str, Tensor]) -> Made:
    sides = both(model).items()
    return Made({name: functools.partial(trained, side.train(), inputs) for name, side in sides})


def t5_training(tiny: bool) -> Made:
    """The published dropout of 0.1."""
    model, draw = shapes.built(shapes.flan_t5_base, tiny), random.Random(0)
    rows, source, labels = (2, (4, 12), (3, 6)) if tiny else (8, (32, 256), (16, 96))
    ids, mask = _tokens(model.config.vocab_size, _lengths(draw, rows, *source))
    wanted = _labels(model.config.vocab_size, _lengths(draw, rows, *labels)[::-1])
    return _training(model, {"input_ids": ids, "attention_mask": mask, "labels": wanted})


def whisper_training(tiny: bool) -> Made:
    model, draw = shapes.built(shapes.whisper_small, tiny), random.Random(0)
    rows, labels = (2, (3, 6)) if tiny else (4, (20, 128))
    frames = torch.randn(rows, 80, 2 * model.config.max_source_positions)
    wanted = _labels(model.config.vocab_size, _lengths(draw, rows, *labels))
    return _training(model, {"input_features": frames, "labels": wanted})


WORKS = (
    Work("Whisper-small, 1500 keys, 5 beams, a step", whisper_step, (8, 64),
         {BASE: 4.0, ENGINE: 1.2}),
    Work("Flan-T5-base, 512 source tokens, 4 beams, a step", t5_step, (8, 64),
         {BASE: 4.0, ENGINE: 1.2}),
    Work("NLLB-600M, 8 sentences of 20 to 60 tokens, 4 beams, 40 tokens, whole call", nllb_call,
         (40, 40), {BASE: 4.0, ENGINE: 1.2}),
    Work("Donut-base's decoder, 4800 keys, greedy, a step", donut_step, (8, 64), {BASE: 2.5}),
    Work("BLIP-base's decoder, 577 keys, 3 beams, a step", blip_step, (8, 64), {BASE: 3.0}),
    Work("Mllama's decoder, 5 layers, 6404 keys, 4 beams, a step", mllama_step, (4, 16),
         {BASE: 3.0}),
    Work("Flan-T5-base, a step of training, 8 padded rows", t5_training, (0, 0), {BASE: 1.8}),
    Work("Whisper-small, a step of training, 4 recordings", whisper_training, (0, 0), {BASE: 1.8}),
)  # fmt: skip
