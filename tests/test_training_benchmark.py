"""The benchmarks of training compare the same work, and count it right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import __main__ as training
from benchmarks.training import counted, drift, workload

TINY = workload.SHAPES["tiny"]


def test_batches_have_the_papers_lengths() -> None:
    """Means of the seven pairs, a cap of 128, images once."""
    config = TINY.model().config
    batch = workload.batch(config, 200, 6)
    labels = (batch["labels"] != -100).sum(1).float()
    wanted = sum(target for _, target in workload.PAIRS.values()) / len(workload.PAIRS)
    assert abs(labels.mean() - wanted) < 3
    assert labels.max() <= workload.MOST
    assert len(batch["pixel_values"]) == 200
    assert len(batch["labels"]) == 1200
    assert torch.equal(batch["image_of_prompt"].bincount(), torch.full((200,), 6))
    placeholders = (batch["input_ids"] == config.image_token_id).sum(1)
    assert (placeholders == workload.IMAGE_TOKENS).all()


def test_a_case_of_the_training_benchmark() -> None:
    case = training.measure(TINY, 1, lambda line: None)
    sides = case["sides"]
    assert sides[training.SIDES[2]]["batch"]["targets"] == 6 * TINY.images
    assert sides[training.SIDES[0]]["batch"] == sides[training.SIDES[1]]["batch"]
    assert all(figures["seconds"] > 0 for figures in sides.values())


def test_drift_is_judged_by_what_rounding_does(tmp_path: Path) -> None:
    code = drift.main(["--shape", "tiny", "--steps", "3", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "training-drift.json").read_text())
    assert code == (0 if figures["cases"][0]["within"] else 1)
    assert len(figures["cases"][0]["loss"][drift.RUNS[0]]) == 3
    assert (tmp_path / "training-drift.svg").stat().st_size > 1000


@pytest.mark.slow
def test_a_micro_batch_is_counted() -> None:
    plain, ours = (counted.count("0.4B", side) for side in counted.SIDES[:2])
    assert plain["decoder_tokens"] == ours["decoder_tokens"]
    # the products of padding are gone, and those of the loss are one more: logits twice
    vocabulary, width = 257_024, 768
    loss = 4 * 2 * ours["decoder_tokens"] * vocabulary * width
    found = sum(
        flops for name, (_, _, flops) in ours["by_operator"].items() if "cross_entropy" in name
    )
    assert found == loss
    padded = plain["targets"] * 3 * 2 * vocabulary * width
    assert padded < plain["flops"]
    assert ours["flops"] < 0.6 * plain["flops"]
    assert ours["bytes"] < 0.4 * plain["bytes"]
    assert ours["peak_activation_bytes"] < 0.2 * plain["peak_activation_bytes"]
