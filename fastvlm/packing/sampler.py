"""TokenBudgetBatchSampler: batches by tokens instead of by a number of samples."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from fastvlm.checks import choice, describe, fail
from fastvlm.packing.plan import Planner, Step
from fastvlm.packing.tokens import count

_OP = "packing.TokenBudgetBatchSampler"
UNLIMITED = 2**62
Lengths = Sequence[Any] | Tensor | NDArray[np.int64] | Callable[[int], Any]


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of sample indices that stay within token budgets, for ``DataLoader(batch_sampler=)``.

    lengths: of each sample its decoder tokens, or (decoder tokens, encoder tokens), or (decoder
        tokens, encoder tokens, images), images being 1 where it is left out; a sequence, array or
        int tensor [N] or [N, k], or a callable of the index, with num_samples. What
        ``PackingCollator.lengths`` gives fits. Tokens are counted without padding.
    max_target_tokens, max_prompt_tokens, max_images: the budgets of a batch; None sets no bound.
    image_ids: of each sample, or None. Samples with one id stay in one batch and count as the
        images of the first; more of them than a batch holds are cut into several.
    num_replicas, rank: the data-parallel ranks, and whose batches to give. rank None gives those
        of all ranks, a step's ``num_replicas`` batches one after the other: the order in which
        Accelerate deals batches out, so under ``accelerator.prepare`` it must be None.
    shuffle, seed: the order. Batches are made by first-fit-decreasing within windows of ``window``
        samples (at most an eighth of all) of the shuffled order, so what shares a batch is random
        too; without shuffle, in the order of the samples.
    drop_last: leave out what does not fill a last step of all ranks; otherwise batches are split
        for it. Nothing is left out then, and nothing repeated unless no batch can be split, all
        being one sample: then fewer than num_replicas samples come twice.
    oversized: what becomes of a sample above a budget: "error", or "alone" in its batch.

    Every rank gets as many batches, in every epoch: ``len`` is exact, for all epochs, and what a
    learning-rate schedule can rely on. The batches of a step differ in tokens (decoder and encoder
    together) as little as neighbours in the order of load do (without shuffle: in the given order).

    An epoch is chosen by ``set_epoch``. ``state_dict`` after n batches and ``load_state_dict`` give
    the batches after the n-th. A loader with workers, and Accelerate, draw batches ahead of the
    loop: take the state of ResumableDataLoader instead, or say how many were ``consumed``.

    Cost: planning goes through all samples, some ten microseconds for each, once per epoch.
    ValueError names the argument; also a sample above a budget (oversized="error"), a state that
    was taken from other lengths or arguments, no step for all ranks under drop_last.
    """

    batch_size: int | None = None  # it varies; Accelerate looks for the attribute

    def __init__(
        self,
        lengths: Lengths,
        *,
        max_target_tokens: int | None,
        max_prompt_tokens: int | None = None,
        max_images: int | None = None,
        image_ids: Sequence[Hashable] | None = None,
        num_samples: int | None = None,
        num_replicas: int = 1,
        rank: int | None = 0,
        shuffle: bool = True,
        seed: int = 0,
        window: int = 2048,
        drop_last: bool = False,
        oversized: str = "error",
    ) -> None:
        for name, value in (
            ("max_target_tokens", max_target_tokens),
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_images", max_images),
        ):
            count(_OP, name, value)
        if type(num_replicas) is not int or num_replicas < 1:
            raise fail(_OP, "num_replicas", "a whole number, 1 or more", num_replicas)
        if rank is not None and not (type(rank) is int and 0 <= rank < num_replicas):
            raise fail(_OP, "rank", f"None or in [0, {num_replicas})", rank)
        if type(window) is not int or window < 1:
            raise fail(_OP, "window", "a whole number, 1 or more", window)
        if type(seed) is not int or seed < 0:
            raise fail(_OP, "seed", "a whole number, 0 or more", seed)
        choice(_OP, "oversized", oversized, ("error", "alone"))
        table = length_table(lengths, num_samples, _OP)
        budgets = budget_array(max_target_tokens, max_prompt_tokens, max_images)
        if oversized == "error":
            _refuse_oversized(table, budgets)
        self._units, costs = _units(table, budgets, image_ids)
        self.num_replicas, self.rank, self.drop_last = num_replicas, rank, drop_last
        loads = costs[:, :2].sum(1)
        # what has no bound must not decide the order in which bins are filled
        costs = costs * (budgets < UNLIMITED)
        # in one window for all, the same samples would share batches in every epoch
        window = min(window, max(1, len(costs) // 8))
        self._planner = Planner(
            costs, budgets, loads, num_replicas, window, shuffle, drop_last, seed
        )
        described = repr((budgets.tolist(), num_replicas, window, shuffle, drop_last, seed))
        described += repr(self._units)
        self._fingerprint = zlib.crc32(described.encode() + table.tobytes())
        self.epoch = 0
        self._planned: tuple[int, list[Step]] = (0, self._planner.plan(0))
        self._num_steps = len(self._planned[1])
        if not self._num_steps and len(table):
            wanted = f"False, or fewer ranks: a step needs {num_replicas} batches"
            raise fail(_OP, "drop_last", wanted, drop_last)
        self._start = 0
        self._drawn = 0

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """Itself: where Accelerate and Lightning look for a ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next ``iter`` goes through; a loaded position holds for its own.

        ValueError: an epoch before that of a state loaded and not yet gone on from. It would
        repeat what was trained on.
        """
        if self._start and epoch < self.epoch:
            wanted = f"{self.epoch} or later, the state that was loaded is of it"
            raise fail(_OP, "epoch", wanted, epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self._start = self._drawn = 0

    def __len__(self) -> int:
        """Batches of this rank (of all ranks where rank is None) in an epoch, each epoch."""
        return self._num_steps * (self.num_replicas if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        first, self._start = self._start, 0
        per_step = self.num_replicas if self.rank is None else 1
        self._drawn = first * per_step
        for step in self._steps()[first:]:
            for one in step if self.rank is None else [step[self.rank]]:
                self._drawn += 1
                if self._units is None:
                    yield list(one)
                else:
                    yield [index for unit in one for index in self._units[unit]]

    def state_dict(self, consumed: int | None = None) -> dict[str, int]:
        """Where the epoch stands, the same on every rank.

        consumed: batches of this rank that the training loop has had in this epoch, counted from
        the epoch's start; None for all that were drawn (right without a loader that reads ahead).
        """
        drawn = self._drawn // (self.num_replicas if self.rank is None else 1)
        steps = max(drawn, self._start) if consumed is None else consumed
        if not 0 <= steps <= self._num_steps:
            raise fail(_OP, "consumed", f"in [0, {self._num_steps}]", consumed)
        return {"epoch": self.epoch, "batches": steps, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next ``iter`` goes on from there. ValueError: not a state of this very sampler."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"fastvlm.{_OP}: the state was taken with other lengths, budgets, ranks, window, "
                "seed, shuffle or drop_last, so its position means other batches here"
            )
        self.epoch = state["epoch"]
        self._start, self._drawn = state["batches"], 0

    def _steps(self) -> list[Step]:
        if self._planned[0] != self.epoch:
            self._planned = (self.epoch, self._planner.plan(self.epoch, self._num_steps))
        return self._planned[1]


def budget_array(target: int | None, prompt: int | None, images: int | None) -> NDArray[np.int64]:
    values = [UNLIMITED if budget is None else budget for budget in (target, prompt, images)]
    return np.array(values, dtype=np.int64)


def length_table(lengths: Lengths, num_samples: int | None, op: str) -> NDArray[np.int64]:
    """int64 [N, 3]: decoder tokens, encoder tokens, images."""
    if callable(lengths) and not isinstance(lengths, Tensor):
        if num_samples is None:
            raise fail(op, "num_samples", "given where lengths is a callable", num_samples)
        lengths = [lengths(index) for index in range(num_samples)]
    table = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    if table.size == 0:
        return np.zeros((0, 3), dtype=np.int64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] > 3 or table.dtype.kind not in "iu":
        given = f"{describe(table.dtype)} of shape {list(table.shape)}"
        raise fail(op, "lengths", "whole numbers [N] or [N, 1 to 3]", given)
    if table.min() < 0:
        raise fail(op, "lengths", "0 or more, each", int(table.min()))
    full = np.tile(np.array([0, 0, 1], dtype=np.int64), (len(table), 1))
    full[:, : table.shape[1]] = table
    return full


def _refuse_oversized(table: NDArray[np.int64], budgets: NDArray[np.int64]) -> None:
    for column, name in enumerate(("max_target_tokens", "max_prompt_tokens", "max_images")):
        above = np.flatnonzero(table[:, column] > budgets[column])
        if len(above):
            index = int(above[0])
            wanted = (
                f"at least {table[:, column].max()}, the largest sample (sample {index} has "
                f"{table[index, column]}, {len(above)} samples are above it), or "
                "oversized='alone', or shorter samples"
            )
            raise fail(_OP, name, wanted, int(budgets[column]))


def _units(
    table: NDArray[np.int64], budgets: NDArray[np.int64], image_ids: Sequence[Hashable] | None
) -> tuple[list[list[int]] | None, NDArray[np.int64]]:
    """Samples that stay together (None: each by itself), and their costs [units, 3].

    An image is paid once.
    """
    if image_ids is None:
        return None, table
    if len(image_ids) != len(table):
        raise fail(_OP, "image_ids", f"of one entry for each of {len(table)} samples", image_ids)
    units: list[list[int]] = []
    costs: list[NDArray[np.int64]] = []
    current: dict[Hashable, int] = {}
    for index, image in enumerate(image_ids):
        unit = current.get(image)
        joined = None if unit is None else costs[unit] + table[index] * np.array([1, 1, 0])
        if unit is not None and joined is not None and (joined <= budgets).all():
            units[unit].append(index)
            costs[unit] = joined
        else:
            current[image] = len(units)
            units.append([index])
            costs.append(table[index].copy())
    return units, np.array(costs, dtype=np.int64).reshape(-1, 3)
