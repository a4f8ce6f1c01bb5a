"""A trainer's own copy of a family: the file of transformers under another name, with edits."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import models
import torch
from models import _gemma, _sound, _t5_sizes, _text
from torch import nn

HOMES = {
    "bart": ("bart", "BartForConditionalGeneration"),
    "mbart": ("mbart", "MBartForConditionalGeneration"),
    "whisper": ("whisper", "WhisperForConditionalGeneration"),
    "m2m_100": ("m2m_100", "M2M100ForConditionalGeneration"),
    "marian": ("marian", "MarianMTModel"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "t5gemma": ("t5gemma", "T5GemmaForConditionalGeneration"),
    "t5": ("t5", "T5ForConditionalGeneration"),
    "bert": ("bert", "BertLMHeadModel"),
    "blip_text": ("blip", "BlipTextLMHeadModel"),
    "pix2struct": ("pix2struct", "Pix2StructForConditionalGeneration"),
}
_made = 0


def module_of(name: str, *edits: tuple[str, str]) -> Any:
    """The module of a family's classes, each (old, new) replaced in its text everywhere."""
    global _made
    folder, _ = HOMES[name]
    original = importlib.import_module(f"transformers.models.{folder}.modeling_{name}")
    assert original.__file__ is not None
    text = Path(original.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, f"the edit has nothing to replace: {old}"
        text = text.replace(old, new)
    _made += 1
    module = types.ModuleType(f"trainer_{_made}.modeling_{name}")
    vars(module).update(__package__=original.__package__, __file__=original.__file__)
    sys.modules[module.__name__] = module
    code = compile(text, original.__file__, "exec", dont_inherit=True)
    exec(code, vars(module))
    return module


def build(name: str, *edits: tuple[str, str], **settings: Any) -> nn.Module:
    model_class = getattr(module_of(name, *edits), HOMES[name][1])
    config_class = model_class.config_class
    if name == "t5gemma":
        module = _gemma(**settings)
        ends = {
            n: module[n] for n in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")
        }
        calm = {"dropout_rate": 0.0, "attention_dropout": 0.0}
        config = config_class(encoder=dict(module), decoder=dict(module), **calm, **ends)
    else:
        sizes = {"gemma2": _gemma, "whisper": _sound, "t5": _t5_sizes}.get(name, _text)()
        config = config_class(**{**sizes, **settings})
    torch.manual_seed(0)
    return models._spread(model_class(config), 0.2 if "gemma" in name else 0.15)
