"""Whatever model of transformers is given to `patch`: the same numbers, or left alone, or refused.

A third of the types runs, all of them with --strangers all (or FASTVLM_STRANGERS=all).
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import differences, tried
from model_types import NONE_OF_THESE, TYPES
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

import fastvlm

ONCE = "runs once per image"
THIRDS = 1 if os.environ.get("FASTVLM_STRANGERS") == "all" else 3
# what the patch of a family must go on reporting, and nothing left alone
_SEQ2SEQ = {"self_attention", "cross_attention", "cached_attention", "gelu_mlp"}
WHOLE = {
    **dict.fromkeys(("bart", "mbart", "plbart", "whisper", "m2m_100", "marian"), _SEQ2SEQ),
    **dict.fromkeys(("pegasus", "blenderbot", "blenderbot-small"), _SEQ2SEQ),
    "t5": {*_SEQ2SEQ, "rms_norm"},
    **dict.fromkeys(("mt5", "umt5"), {*_SEQ2SEQ, "rms_norm"} - {"gelu_mlp"} | {"geglu_mlp"}),
    "pix2struct": {*_SEQ2SEQ, "rms_norm"} - {"gelu_mlp"} | {"geglu_mlp"},
    "gemma2": {"self_attention", "cached_attention", "rope", "geglu_mlp", "residual_rms_norm"},
    "t5gemma": {"self_attention", "cross_attention", "rope", "geglu_mlp", "residual_rms_norm"},
    "t5gemma2": {"self_attention", "cross_attention", "rope", "geglu_mlp", "rms_norm"},
    "gemma3_text": {"self_attention", "cached_attention", "rope", "geglu_mlp", "rms_norm"},
    **dict.fromkeys(("vit+trocr", "vit+trocr of waves"), _SEQ2SEQ | {"residual_layer_norm"}),
    **dict.fromkeys(
        ("vit+bert", "vit+roberta", "bert+bert", "bert+bert_generation", "bert+electra"),
        _SEQ2SEQ | {"residual_layer_norm"},
    ),
    **dict.fromkeys(("bert+xlm_roberta", "blip"), _SEQ2SEQ | {"residual_layer_norm"}),
    "vit+bart": {"self_attention", "cross_attention", "gelu_mlp", "residual_layer_norm"},
    **dict.fromkeys(("vit+gpt2", "bert+gpt2"), _SEQ2SEQ),
    "gpt2": _SEQ2SEQ - {"cross_attention"},
    "swin+mbart": {"self_attention", "cross_attention", "gelu_mlp"},
}


def _chosen() -> list[str]:
    """The families whole, and of the others those whose turn it is."""
    families = set(WHOLE)
    return [n for n in TYPES if n in families or zlib.crc32(n.encode()) % THIRDS == 0]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", _chosen())
def test_a_type_gives_the_same_or_is_refused(name: str) -> None:
    kind = TYPES[name]
    model, report, reason = tried(kind.make)
    if report is None:
        assert "nothing can be patched" in reason
        assert name not in WHOLE
        return
    assert all(entry.patched or entry.reason for entry in report.entries)
    assert kind.batches is not None, f"{name} is patched: give it a batch in model_types.py"
    found = {op for entry in report.patched for op in entry.ops}
    assert found >= WHOLE.get(name, set())
    assert name not in WHOLE or all(entry.reason == ONCE for entry in report.skipped)
    assert differences(kind.make(), model, *kind.batches()) == []


def _listed() -> set[str]:
    """The types (as transformers calls them) of the models that the list builds."""
    names = set()
    for key, kind in TYPES.items():
        model_class = getattr(__import__("transformers"), kind.name, None)
        names.add(key if model_class is None else model_class.config_class.model_type)
    return names


def _reads_an_encoder(model_type: str) -> bool:
    """By its configuration, or by what its modules are written with."""
    try:
        config = configuration_auto.CONFIG_MAPPING[model_type]
    except (ImportError, KeyError):
        return False
    if getattr(config, "is_encoder_decoder", False) is True:
        return True
    found = importlib.util.find_spec(config.__module__)
    assert found is not None
    assert found.origin is not None
    files = Path(found.origin).parent.glob("modeling_*.py")
    return any("EncoderDecoderCache" in file.read_text(encoding="utf-8") for file in files)


def test_every_type_with_an_encoder_and_a_decoder_is_listed() -> None:
    known = {
        model_type
        for name, mapping in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_NAMES")
        for model_type in mapping
    }
    assert len(known) > 300
    missing = {t for t in known if _reads_an_encoder(t)} - _listed() - NONE_OF_THESE
    assert not missing, f"give these a line in tests/strangers/model_types.py: {sorted(missing)}"


def test_a_planted_fault_is_seen() -> None:
    """The comparison sees other numbers: a patched model whose layer loses its second branch."""
    kind = TYPES["bart"]
    model, _, _ = tried(kind.make)
    layer = model.model.decoder.layers[1]
    layer.encoder_attn.out_proj.weight = nn.Parameter(layer.encoder_attn.out_proj.weight * 1.001)
    assert kind.batches is not None
    found = differences(kind.make(), model, *kind.batches())
    assert any("loss" in line for line in found)
    fastvlm.unpatch(model)
