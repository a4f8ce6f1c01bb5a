"""What Accelerate, DDP, Trainer and inference_mode do with the output of a call with labels."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import FAMILIES
from test_loss_without_logits import TRAINED, both
from test_training import collate, data, trainer
from torch import Tensor, nn

import fastvlm
from fastvlm.patching.logits import LazyLogits

GROUPS = {"groups": torch.tensor([1, 0, 1]), "num_groups": 2}


@pytest.fixture
def accelerate() -> Iterator[Any]:
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
    yield accelerate
    AcceleratorState._reset_state(reset_partial_state=True)


def same_groups(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert torch.allclose(got.group_losses, expected.group_losses, rtol=tolerance)
    assert torch.equal(got.group_tokens, expected.group_tokens)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_the_losses_of_groups_pass_through_accelerate(
    name: str, precision: str, accelerate: Any
) -> None:
    _, ours, batch = both(name)
    expected = ours(**batch, **GROUPS)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(ours)
    got = prepared(**batch, **GROUPS)
    assert type(got.__dict__["logits"]) is LazyLogits  # nobody has looked
    same_groups(got, expected, 5e-2 if precision == "bf16" else 1e-5)
    assert got["group_losses"] is got.group_losses
    same_groups(pickle.loads(pickle.dumps(got)), got)


@pytest.mark.parametrize("name", ["bart", "gemma2", "florence2"])
def test_unwrapping_leaves_the_patch_in(name: str, accelerate: Any) -> None:
    plain, ours, batch = both(name)
    expected = plain(**batch).loss
    runner = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    again = runner.unwrap_model(runner.prepare(ours), keep_fp32_wrapper=False)
    out = again(**batch, **GROUPS)
    assert torch.allclose(out.loss, expected, rtol=1e-5)
    assert type(out.__dict__["logits"]) is LazyLogits
    assert out.group_tokens.sum() > 0


@pytest.mark.parametrize(
    "settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_the_losses_of_groups_pass_through_ddp(settings: dict[str, bool]) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        plain, ours, batch = both("bart")
        expected = ours(**batch, **GROUPS)
        wrapper = nn.parallel.DistributedDataParallel(ours, **settings)
        out = wrapper(**batch, **GROUPS)
        assert type(out.__dict__["logits"]) is LazyLogits
        same_groups(out, expected)
        out.loss.backward()
        assert torch.allclose(plain(**batch).loss, out.loss, rtol=1e-5)
    finally:
        dist.destroy_process_group()


def test_walks_of_the_user_give_tensors() -> None:
    plain, ours, batch = both("bart")
    expected = plain(**batch, use_cache=False)
    walks = (lambda o: o.items(), lambda o: zip(o, o.values()), lambda o: zip(o, o.to_tuple()))
    for walk in walks:
        found = {key: type(value) for key, value in walk(ours(**batch))}
        assert found == dict.fromkeys(expected, Tensor)


def _gather(rank: int, folder: str) -> None:
    import accelerate

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = FAMILIES["bart"].build().train()
    whole = FAMILIES["bart"].training(model)
    expected = model(**whole, use_cache=False)
    batch = {name: value[rank : rank + 1] for name, value in whole.items()}
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        runner = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        ours = copy.deepcopy(model)
        fastvlm.patch(ours)
        out = runner.prepare(ours)(**batch)
        assert runner.num_processes == 2
        got = runner.gather_for_metrics(out)
        assert got["logits"].shape == (2, *expected.logits.shape[1:])
        labelled = whole["labels"][:2] != -100
        near = {"no": 1e-4, "bf16": 0.3}[precision]
        assert torch.allclose(got.logits[labelled], expected.logits[:2][labelled], atol=near)
        assert runner.gather(ours(**batch))["loss"].shape == (2,)
    dist.destroy_process_group()


@pytest.mark.slow
def test_outputs_of_two_processes_are_gathered(tmp_path: Path) -> None:
    mp.spawn(_gather, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_losses_under_inference_mode(name: str, training: bool) -> None:
    plain, ours, batch = both(name)
    with torch.inference_mode():
        expected = plain.train(training)(**batch)
        got = ours.train(training)(**batch)
        assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    seen = batch["labels"] != -100
    assert torch.allclose(got.logits[seen], expected.logits[seen], atol=1e-4)


@pytest.mark.parametrize("name", ["florenz", "florence2", "t5gemma"])
@pytest.mark.parametrize("patched", [False, True])
def test_evaluation_by_the_trainer(name: str, patched: bool, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    expected = FAMILIES[name].build()
    if patched:
        fastvlm.patch(model)
    found = trainer(model, tmp_path).evaluate(data()[:2])["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(expected(**collate(data()[:2])).loss.item(), rel=1e-4)
