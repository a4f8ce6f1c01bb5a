"""What torchrun starts for test_example_trainers.py: the examples for several processes, patched
and not, one after the other in one pair of processes, as their start takes longer than they do."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastvlm

EPOCHS = 1


def plain_steps(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """In place of AdamW, whose first steps are signs: of a gradient that is all rounding, any."""
    return torch.optim.SGD(parameters, lr=10 * lr)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    ddp, fsdp2 = importlib.import_module("ddp_loop"), importlib.import_module("fsdp2_loop")
    # one group for all: a second one would find the first one's addresses in torchrun's store
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    patch: Any = fastvlm.patch
    torch.optim.AdamW = plain_steps  # type: ignore[assignment,misc]
    found = {}
    for side in ("patched", "plain"):
        fastvlm.patch = patch if side == "patched" else lambda model: None
        found[f"ddp-{side}"] = ddp.main(EPOCHS)
        found[f"fsdp2-{side}"] = fsdp2.main(str(folder / side), EPOCHS)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # a thread of gloo lets go of its last tensors when it gets to it, and that needs an interpreter
    # which is not ending: else PyTorch aborts
    sys.stdout.flush()
    os._exit(0)
