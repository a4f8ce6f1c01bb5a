"""What is promised for every supported transformers, 4.48.1 on: run by `make test-oldest` too."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import transformers
from torch import nn

import fastvlm

OLD = int(transformers.__version__.split(".")[0]) < 5


def gemma2() -> nn.Module:
    # a window as long as the text: 4.48's own cache fails on a shorter one
    return models.gemma2(sliding_window=64)


@pytest.mark.parametrize("build", [models.bart, models.mbart, gemma2], ids=lambda f: f.__name__)
def test_same_tokens_and_loss(build: Callable[[], nn.Module]) -> None:
    model = build()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    tokens = model.generate(**inputs, **settings)
    with torch.no_grad():
        loss = model(**inputs, labels=ids).loss
    report = fastvlm.patch(model)
    assert torch.equal(model.generate(**inputs, **settings), tokens)
    with torch.no_grad():
        assert torch.allclose(model(**inputs, labels=ids).loss, loss, atol=1e-5)
    ops = {op for entry in report.patched for op in entry.ops}
    assert "linear" in ops
    if build is gemma2:
        assert {"geglu_mlp", "rms_norm"} <= ops
    if OLD:
        assert any("need transformers 5" in (entry.reason or "") for entry in report.skipped)
    else:
        assert "self_attention" in ops
    fastvlm.unpatch(model)
    assert torch.equal(model.generate(**inputs, **settings), tokens)
