"""One of two processes of test_frameworks.py: which images reach its training steps."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fastvlm.packing import PackingCollator, TokenBudgetBatchSampler

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
tiny = importlib.import_module("tiny")


def images(batch: dict[str, Any]) -> list[float]:
    return batch["pixel_values"][:, 0, 0, 0].tolist()


def with_accelerate(folder: str) -> list[list[float]]:
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    sampler = TokenBudgetBatchSampler(
        [collator.lengths(sample) for sample in tiny.samples()],
        max_target_tokens=40,
        num_replicas=accelerator.num_processes,
        rank=None,
    )
    loader = torch.utils.data.DataLoader(tiny.samples(), batch_sampler=sampler, collate_fn=collator)
    model, loader = accelerator.prepare(tiny.model(), loader)
    seen = []
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        seen.append(images(batch))
    return seen


def with_trainer(folder: str) -> list[list[float]]:
    """Two epochs, then again from a checkpoint in the middle of the second."""
    script = importlib.import_module("trainer")
    settings = {
        "use_cpu": True,
        "num_train_epochs": 2,
        "save_steps": 5,
        "save_strategy": "steps",
        "disable_tqdm": True,
    }
    seen: list[list[float]] = []
    for resume in (None, str(Path(folder) / "checkpoint-5")):
        run = script.trainer(folder, tiny.samples(), **settings)
        step = run.training_step

        def watched(model: Any, inputs: Any, *args: Any, step: Any = step) -> Any:
            seen.append(images(inputs))
            return step(model, inputs, *args)

        run.training_step = watched
        run.train(resume_from_checkpoint=resume)
    return seen


if __name__ == "__main__":
    kind, folder, rank = sys.argv[1:]
    found = {"accelerate": with_accelerate, "trainer": with_trainer}[kind](folder)
    assert torch.distributed.get_world_size() == 2
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    # a thread of gloo lets go of its last tensors when it gets to it, and that needs an interpreter
    # which is not ending: else PyTorch aborts
    sys.stdout.flush()
    os._exit(0)
