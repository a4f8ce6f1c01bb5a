"""The examples run; transformers' Trainer and Accelerate see every sample once, and resume."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastvlm.packing import (
    PackingCollator,
    ResumableDataLoader,
    TokenBudgetBatchSampler,
    pack_iterable,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an example by name, and forgets it afterwards: their names are short."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


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
    transformers = pytest.importorskip("transformers")
    tiny = example("tiny")
    collator = PackingCollator(
        groups=tiny.TASKS, pad_token_id=1, decoder_pad_token_id=1, decoder_start_token_id=2
    )
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
    run = transformers.Trainer(tiny.TinyModel(), arguments, collator, packed)
    seen = watched(run)
    run.train()
    assert seen == [ids(collator(batch)) for batch in packed][:4]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_accelerate_deals_out_what_the_sampler_made_for_each_rank(
    example: Any, num_processes: int
) -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    tiny = example("tiny")
    samples = tiny.samples()
    collator = PackingCollator(groups=tiny.TASKS, pad_token_id=1)
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


def _two_processes(path: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    accelerate = importlib.import_module("accelerate")
    tiny = importlib.import_module("tiny")
    accelerator = accelerate.Accelerator(cpu=True)
    collator = PackingCollator(
        groups=tiny.TASKS, pad_token_id=1, decoder_pad_token_id=1, decoder_start_token_id=2
    )
    samples = tiny.samples()
    sampler = TokenBudgetBatchSampler(
        [collator.lengths(sample) for sample in samples],
        max_target_tokens=40,
        num_replicas=accelerator.num_processes,
        rank=None,
    )
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collator)
    model, loader = accelerator.prepare(tiny.TinyModel(), loader)
    seen = []
    for batch in loader:
        accelerator.backward(model(**batch)["loss"])
        seen += batch["pixel_values"][:, 0, 0, 0].tolist()
    torch.save(seen, f"{path}/{accelerator.process_index}.pt")


@pytest.mark.slow
def test_two_processes_train_on_all_images_once(example: Any, tmp_path: Path) -> None:
    launchers = pytest.importorskip("accelerate")
    launchers.debug_launcher(_two_processes, args=(str(tmp_path),), num_processes=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(halves)
    wanted = [float(s["pixel_values"][0, 0, 0]) for s in example("tiny").samples()]
    assert sorted(halves[0] + halves[1]) == sorted(wanted)


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
