"""The examples run; transformers' Trainer and Accelerate see every sample once, and resume."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import transformers
from accelerate import data_loader
from torch.utils.data import DataLoader

from fastvlm.packing import (
    PackingCollator,
    ResumableDataLoader,
    TokenBudgetBatchSampler,
    pack_iterable,
)

ROOT = Path(__file__).parents[2]


def falls(losses: list[float]) -> bool:
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.6 * sum(losses[:third])


def lines(function: Any) -> int:
    return sum(bool(line.strip()) for line in inspect.getsource(function).splitlines()) - 1


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_the_loops_train(example: Any, name: str) -> None:
    script = example(name)
    assert falls(script.main())
    assert lines(script.main) < 20


def test_the_trainer_trains(example: Any, tmp_path: Path) -> None:
    script = example("trainer")
    assert falls(script.main(str(tmp_path)))
    assert lines(script.PackedTrainer) < 20


def ids(batch: dict[str, Any]) -> tuple[Any, ...]:
    """What a batch holds, in an order that can be compared."""
    return tuple(batch["labels"].flatten().tolist()), tuple(batch["groups"].tolist())


def watched(run: Any) -> list[Any]:
    """The batches that reach the training step."""
    seen: list[Any] = []
    step = run.training_step

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        seen.append(ids(inputs))
        return step(model, inputs, *args)

    run.training_step = training_step
    return seen


@pytest.mark.turns(2)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [4, 9], ids=["first-epoch", "second-epoch"])
def test_the_trainer_sees_all_and_resumes_in_the_middle(
    example: Any, tmp_path: Path, stop_at: int, workers: int
) -> None:
    script, tiny = example("trainer"), example("tiny")
    settings = {
        "use_cpu": True,
        "save_steps": stop_at,
        "save_strategy": "steps",
        "disable_tqdm": True,
        "dataloader_num_workers": workers,
        "num_train_epochs": 3,
    }
    run = script.trainer(str(tmp_path), tiny.samples(), **settings)
    seen = watched(run)
    run.train()
    per_epoch = len(run.get_train_dataloader())
    assert stop_at % per_epoch
    assert len(seen) == 3 * per_epoch
    wanted = sorted(len(target["label_ids"]) for s in tiny.samples() for target in s["targets"])
    for epoch in range(3):
        batches = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sum(len(groups) for _, groups in batches) == len(wanted)
        tokens = sum(token != -100 for labels, _ in batches for token in labels)
        assert tokens == sum(wanted)
    assert sorted(seen[:per_epoch]) != sorted(seen[per_epoch : 2 * per_epoch])

    again = script.trainer(str(tmp_path), tiny.samples(), **settings)
    resumed = watched(again)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop_at}"))
    assert resumed == seen[stop_at:]
    assert again.state.global_step == run.state.global_step


def test_the_trainer_takes_a_packed_stream(example: Any, tmp_path: Path) -> None:
    tiny = example("tiny")
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    packed = pack_iterable(tiny.samples(), collator, max_target_tokens=64)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=1,
        accelerator_config={"dispatch_batches": False},
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    run = transformers.Trainer(tiny.model(), arguments, collator, packed)
    seen = watched(run)
    run.train()
    assert seen == [ids(collator(batch)) for batch in packed][:4]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_accelerate_deals_out_what_the_sampler_made_for_each_rank(
    example: Any, num_processes: int
) -> None:
    tiny = example("tiny")
    samples = tiny.samples()
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    lengths = [collator.lengths(sample) for sample in samples]

    def sampler(rank: int | None) -> TokenBudgetBatchSampler:
        return TokenBudgetBatchSampler(
            lengths, max_target_tokens=40, num_replicas=num_processes, rank=rank
        )

    for rank in range(num_processes):
        loader = data_loader.prepare_data_loader(
            DataLoader(samples, batch_sampler=sampler(None), collate_fn=collator),
            num_processes=num_processes,
            process_index=rank,
        )
        alone = sampler(rank)
        for epoch in range(3):
            # Accelerate counts epochs itself and tells the sampler
            alone.set_epoch(epoch)
            wanted = [ids(collator([samples[i] for i in one])) for one in alone]
            assert len(loader) == len(wanted)
            assert [ids(batch) for batch in loader] == wanted
        loader.set_epoch(1)
        alone.set_epoch(1)
        wanted = [ids(collator([samples[i] for i in one])) for one in alone]
        skipping = data_loader.skip_first_batches(loader, 2)
        if num_processes == 1:
            assert [ids(batch) for batch in skipping] == wanted[2:]
        # the sampler's own state says the same, on any number of processes
        resumed = sampler(None)
        resumed.load_state_dict(alone.state_dict(consumed=2))
        loader = data_loader.prepare_data_loader(
            DataLoader(samples, batch_sampler=resumed, collate_fn=collator),
            num_processes=num_processes,
            process_index=rank,
        )
        loader.set_epoch(1)
        assert [ids(batch) for batch in loader] == wanted[2:]


def two_processes(kind: str, folder: Path) -> list[list[list[float]]]:
    """The images of each step of both ranks, from two processes that train together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = Path(__file__).with_name("one_of_two.py")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), kind, str(folder), rank],
            env={
                **os.environ,
                **common,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def all_images(example: Any) -> list[float]:
    return sorted(float(s["pixel_values"][0, 0, 0]) for s in example("tiny").samples())


@pytest.mark.slow
def test_two_processes_of_accelerate_share_the_images(example: Any, tmp_path: Path) -> None:
    first, second = two_processes("accelerate", tmp_path)
    assert len(first) == len(second)
    assert sorted(chain(*first, *second)) == all_images(example)


@pytest.mark.slow
def test_two_processes_of_the_trainer_share_the_images_and_resume(
    example: Any, tmp_path: Path
) -> None:
    first, second = two_processes("trainer", tmp_path)
    # two epochs, and the rest of the second again, from step 5
    per_epoch = (len(first) + 5) // 4
    assert per_epoch < 5 < 2 * per_epoch
    for rank in (first, second):
        assert rank[2 * per_epoch :] == rank[5 : 2 * per_epoch]
    for epoch in (0, 1):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(chain(*first[part], *second[part])) == all_images(example)


def test_what_lightning_asks_of_a_loader_is_there() -> None:
    sampler = TokenBudgetBatchSampler([1, 2, 3], max_target_tokens=3)
    loader = ResumableDataLoader([0, 1, 2], batch_sampler=sampler, collate_fn=list)
    # it sets the epoch of whichever of these has a set_epoch, and keeps the loader's state
    loader.batch_sampler.sampler.set_epoch(2)  # type: ignore[union-attr]
    assert sampler.epoch == 2
    list(loader)
    other = ResumableDataLoader([0, 1, 2], batch_sampler=sampler, collate_fn=list)
    other.load_state_dict(loader.state_dict())
    assert list(other) == []
