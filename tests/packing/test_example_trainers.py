"""The examples of Lightning, PEFT, TRL, DDP and FSDP2 run, and give the losses of a run without
fastvlm.patch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import EPOCHS, plain_steps

import fastvlm
from fastvlm.florenz import FlorenzForConditionalGeneration
from fastvlm.packing import PackingCollator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """What a run gives with fastvlm.patch and without."""

    def run(main: Callable[[], Any]) -> tuple[Any, Any]:
        ours = main()
        with monkeypatch.context() as plainly:
            plainly.setattr(fastvlm, "patch", lambda model: None)
            return ours, main()

    return run


def fell(losses: list[float], share: float = 0.6) -> bool:
    third = len(losses) // 3
    return sum(losses[-third:]) < share * sum(losses[:third])


def same(ours: list[float], plain: list[float], drift: float = 1e-4) -> bool:
    return ours == pytest.approx(plain, rel=drift)


def test_lightning(example: Any, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = example("lightning_trainer")
    assert fell(script.main(epochs=3))
    monkeypatch.setattr(torch.optim, "AdamW", plain_steps)
    ours, plain = both(lambda: script.main(epochs=2))
    assert same(ours, plain)
    assert ours[-1] < 0.9 * ours[0]


def test_lightning_goes_on_in_the_middle_of_an_epoch(example: Any, tmp_path: Path) -> None:
    script, tiny = example("lightning_trainer"), example("tiny")
    lightning = example("lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole = script.Packed(tiny.samples())
    script.trainer(callbacks=[keep], **quiet).fit(whole)
    per_epoch = len(whole.losses) // 2
    for stop in (2, per_epoch, per_epoch + 2):
        again = script.Packed(tiny.samples())
        checkpoint = str(tmp_path / f"step={stop}.ckpt")
        script.trainer(enable_checkpointing=False, **quiet).fit(again, ckpt_path=checkpoint)
        assert again.losses == whole.losses[stop:], stop


def test_lora_is_merged_saved_and_loaded(example: Any, both: Any, tmp_path: Path) -> None:
    script, tiny = example("peft_lora"), example("tiny")
    peft = example("peft")
    ours, plain = both(lambda: script.main(str(tmp_path)))
    assert same(ours, plain, 1e-3)
    assert fell(ours, 0.9)
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    batch = collator(tiny.samples())
    adapted = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter")
    merged = script.load(str(tmp_path))
    with torch.no_grad():
        logits = [model.eval()(**batch).logits for model in (adapted, merged, tiny.model())]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "dft"}, {"packing": True, "max_length": 16}],
    ids=["plain", "dft", "packed"],
)
def test_trl(example: Any, both: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    script = example("trl_sft")

    def run() -> Any:
        made = script.trainer(str(tmp_path), use_cpu=True, disable_tqdm=True, **settings)
        made.train()
        return made

    ours, plain = both(run)
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    rows = [
        [[entry[name] for entry in each.state.log_history if "loss" in entry] for name in names]
        for each in (ours, plain)
    ]
    assert all(same(*each) for each in zip(*rows))
    assert settings or fell(rows[0][0], 0.9)
    # TRL's forward stays on the model: generate and unpatch go through it
    prompts = {"input_ids": torch.tensor([[4, 5], [9, 10]]), "max_new_tokens": 4, "num_beams": 2}
    texts = [each.model.eval().generate(**prompts) for each in (ours, plain)]
    fastvlm.unpatch(ours.model)
    texts.append(ours.model.generate(**prompts))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def by_torchrun(folder: Path) -> dict[str, list[float]]:
    """The losses of each example, which both processes find."""
    script = Path(__file__).with_name("launched.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(folder)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


def in_one_process(example: Any) -> list[float]:
    """The losses of ddp_loop.py as one process finds them, from the batches of both ranks."""
    script, tiny = example("ddp_loop"), example("tiny")
    model, losses = tiny.model(), []
    optimizer = plain_steps(model.parameters(), lr=0.01)
    ranks = [script.loader(tiny.samples(), rank, 2) for rank in (0, 1)]
    for epoch in range(EPOCHS):
        for one in ranks:
            one.set_epoch(epoch)
        for batches in zip(*ranks):
            labels = [int((batch["labels"] != -100).sum()) for batch in batches]
            sums = [model(**batch).loss * count for batch, count in zip(batches, labels)]
            loss = torch.stack(sums).sum() / sum(labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.turns(3)
def test_two_processes_of_torchrun(example: Any, tmp_path: Path) -> None:
    """They train alike, as one process would; what FSDP2 saved is as of one device."""
    losses, wanted = by_torchrun(tmp_path), in_one_process(example)
    assert losses.keys() == {"ddp-patched", "ddp-plain", "fsdp2-patched", "fsdp2-plain"}
    for name, found in losses.items():
        assert same(found, wanted), name
    tiny = example("tiny")
    collator = PackingCollator(groups=tiny.TASKS, **tiny.IMAGE_TOKENS, **tiny.SPECIAL_IDS)
    batch, ends = collator(tiny.samples()), []
    for side in ("patched", "plain"):
        model = FlorenzForConditionalGeneration.from_pretrained(tmp_path / side)
        with torch.no_grad():
            ends.append(model.eval()(**batch).loss.item())
    assert same(ends[:1], ends[1:])
    assert ends[0] < wanted[0]
