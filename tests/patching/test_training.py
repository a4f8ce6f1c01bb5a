"""Other people's trainers, unchanged: the same losses with and without fastvlm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as tf
from models import FAMILIES
from test_loss_without_logits import assert_same
from torch import Tensor, nn

import fastvlm

LENGTHS = (4, 9, 6, 3, 8, 5, 7, 4, 6, 9, 5, 8)


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, 90, (n,), generator=generator),
            "labels": torch.randint(3, 90, (n - 1,), generator=generator),
        }
        for n in LENGTHS
    ]


def collate_for_smoothing(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """With a label smoother the Trainer keeps the labels to itself."""
    batch = collate(rows)
    labels = batch["labels"].masked_fill(batch["labels"] == -100, models.PAD)
    batch["decoder_input_ids"] = nn.functional.pad(labels[:, :-1], (1, 0), value=models.EOS)
    return batch


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([r["input_ids"] for r in rows], batch_first=True, padding_value=models.PAD)
    labels = pad([r["labels"] for r in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids != models.PAD).long(), "labels": labels}


def trainer(model: nn.Module, folder: Path, **settings: Any) -> tf.Trainer:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        **settings,
    }
    return tf.Trainer(
        model,
        tf.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data(),
        eval_dataset=data()[:4],
        data_collator=collate_for_smoothing if "label_smoothing_factor" in settings else collate,
    )


def logged(run: tf.Trainer, name: str = "loss") -> Tensor:
    return torch.tensor([row[name] for row in run.state.log_history if name in row])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "autocast": {"bf16": True},
}


@pytest.mark.turns(2)
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_the_trainer_of_transformers(name: str, case: str, tmp_path: Path) -> None:
    runs = []
    for patch in (False, True):
        model = FAMILIES[name].build()
        if patch:
            fastvlm.patch(model)
        runs.append(trainer(model, tmp_path, **SETTINGS[case]))
        runs[-1].train()
    plain, ours = map(logged, runs)
    assert len(plain) == 6
    assert plain.std() > 0.01  # they tell one batch from another
    assert torch.allclose(ours, plain, atol=2e-2 if case == "autocast" else 1e-3)
    if case == "evaluation":
        expected, got = (logged(run, "eval_loss") for run in runs)
        assert torch.allclose(got, expected, atol=1e-4)


def test_predictions_for_metrics(tmp_path: Path) -> None:
    plain, ours = models.bart(), models.bart()
    fastvlm.patch(ours)
    expected, got = (trainer(m, tmp_path).predict(data()[:4]) for m in (plain, ours))
    assert got.predictions[0].shape == expected.predictions[0].shape
    labelled = torch.from_numpy(expected.label_ids) != -100
    want, have = (torch.from_numpy(p.predictions[0])[labelled] for p in (expected, got))
    assert torch.allclose(have, want, atol=1e-4)


def test_resumed_and_unbroken_runs_are_the_same(tmp_path: Path) -> None:
    """Saved after three steps and loaded into a new, freshly patched model; with dropout."""

    def run(folder: Path, resume: bool) -> Tensor:
        model = models.bart(dropout=0.1)
        fastvlm.patch(model)
        steps = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        this = trainer(model, folder, **steps)
        this.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return logged(this)

    unbroken = run(tmp_path, resume=False)
    assert torch.equal(run(tmp_path, resume=True), unbroken)


def test_accelerate(tmp_path: Path) -> None:
    """Mixed precision, whose wrapper rebuilds the model's output, and accumulation."""
    import accelerate
    from accelerate.state import AcceleratorState

    def run(patch: bool) -> Tensor:
        model = models.bart().train()
        if patch:
            fastvlm.patch(model)
        AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
        )
        loader = torch.utils.data.DataLoader(data(), batch_size=2, collate_fn=collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                out = model(**batch)
                assert out.logits.shape == (*batch["labels"].shape, models.VOCAB)
                accelerator.backward(out.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(out.loss.detach())
        return torch.stack(losses)

    assert torch.allclose(run(True), run(False), atol=2e-2)


def test_float16_with_a_gradient_scaler() -> None:
    """Scaled losses give scaled gradients; an overflow is found and the step is skipped."""
    losses = []
    for patch in (False, True):
        model = models.florence2().train()
        batch = FAMILIES["florence2"].training(model)
        if patch:
            fastvlm.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert scaler.get_scale() == 2.0**10
        scaler.scale(loss.new_tensor(float("inf")) * model(**batch).loss).backward()
        before = model.lm_head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.lm_head.weight, before)
        assert scaler.get_scale() < 2.0**10
    plain, ours = torch.stack(losses[:3]), torch.stack(losses[3:])
    assert plain[0] - plain[2] > 0.1
    assert torch.allclose(ours, plain, rtol=5e-3)


def test_frozen_parts_get_no_gradient() -> None:
    """As the paper freezes: the vision tower and the projector (arXiv 2503.09443)."""
    plain = models.florence2().train()
    for part in (plain.model.vision_tower, plain.model.multi_modal_projector):
        part.requires_grad_(False)
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    batch = FAMILIES["florence2"].training(plain)
    for model in (plain, ours):
        model(**batch).loss.backward()
    assert_same(ours, plain)


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize("name", ["bart", "gemma2", "t5gemma"])
def test_layers_compile_as_one_graph(name: str) -> None:
    """No graph break in a layer, packed, forward and backward; new lengths need no new graph."""
    torch._dynamo.reset()  # all layers of transformers share one code object, whose graphs count
    plain = FAMILIES[name].build().train()
    ours = copy.deepcopy(plain)
    fastvlm.patch(ours)
    stacks = [ours.get_decoder()]
    stacks += [ours.get_encoder()] if ours.config.is_encoder_decoder else []
    for stack in stacks:
        for layer in stack.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    batch = FAMILIES[name].training(plain)
    with torch._dynamo.config.patch(recompile_limit=16):  # kinds of layers, twice
        for step in range(4):
            batch["labels"][:, 6 - step :] = -100
            batch["attention_mask"][:, 8 - step :] = 0
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                for model in (plain, ours):
                    model(**batch).loss.backward()
    assert_same(ours, plain, 1e-4)
