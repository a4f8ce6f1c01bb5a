"""Block sizes, warps and stages of the kernels, by architecture: one file for each family.

A table gives each kernel a list of cases, the first of which that holds for a call is taken. The
first config of a case serves. ``FASTVLM_AUTOTUNE=1`` times all of them at the first call of each
key on a real GPU, keeps the fastest for the process, and never does so while the current stream is
being captured into a CUDA graph. What is fastest is found by timing, so another run, or another
rank, may add up in another order.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvlm.compat import versions

VARIABLE = "FASTVLM_AUTOTUNE"
FAMILIES = ("sm80", "sm86", "sm90", "sm100", "gfx9")


@dataclass(frozen=True)
class Config:
    """blocks: constexpr arguments of the kernel, BLOCK_M=64 and the like.

    apart: a kernel with two results is launched for each of them, where the registers of a program
    do not hold both.
    resident: of a grid that is persistent, the programs that a multiprocessor holds at once; 0: the
    grid has a program for each tile.
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    apart: bool = False
    resident: int = 0

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        """What a launch takes."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Case:
    """configs serve where when(**key) holds; key is what the launcher knows of the call."""

    configs: list[Config]
    when: Callable[..., bool] = field(default=lambda **key: True)


Table = dict[str, list[Case]]


# the family whose table serves CPU tensors: an emulator's, or a compiler's that has no GPU
_assumed = "sm90"
_replaced: dict[str, Config] = {}
_option: int | None = None
_best: dict[tuple[Any, ...], Config] = {}


def family_of(capability: tuple[int, int], hip: bool = False) -> str:
    """The file that serves a compute capability."""
    if hip:
        return "gfx9"
    major, minor = capability
    if major == 9 or major in (10, 11):
        return "sm90" if major == 9 else "sm100"
    # 12 is the consumer's Blackwell: it has an 8.6's shared memory and none of a 10's instructions
    return "sm80" if (major, minor) == (8, 0) else "sm86"


@functools.cache
def _family(index: int) -> str:
    return family_of(torch.cuda.get_device_capability(index), torch.version.hip is not None)


def family(x: Tensor) -> str:
    return _family(x.device.index) if x.is_cuda else _assumed


@functools.cache
def table(name: str) -> Table:
    """All kernels of one family, as the Triton that is installed may choose from it."""
    module = importlib.import_module(f"fastvlm.triton.configs.{name}")
    spills = importlib.import_module("fastvlm.triton.configs.spills")
    found: Table = {**module.ATTENTION, **module.MLP, **module.LOSS}
    installed = versions.installed("triton")
    version = None if installed is None else versions.parsed(installed)
    return spills.without_spills(name, found, version)


def options(kernel: str, x: Tensor, **key: int) -> list[Config]:
    """The configs that may serve a call, the preferred one first. The launcher gives the key."""
    if kernel in _replaced:
        return [_replaced[kernel]]
    return _options(kernel, family(x), tuple(key.items()))


@functools.cache
def _options(kernel: str, name: str, key: tuple[tuple[str, int], ...]) -> list[Config]:
    for case in table(name)[kernel]:
        if case.when(**dict(key)):
            return case.configs
    raise KeyError(f"no case of {kernel} in {name} for {dict(key)}")


def launch(
    kernel: str, x: Tensor, run: Callable[[Config], None], **key: int
) -> None:  # fmt: skip
    """run(config) with the config that serves: where tuning is on, after timing all of them."""
    configs = options(kernel, x, **key)
    if _option is not None:
        run(configs[_option % len(configs)])
    elif len(configs) == 1 or not x.is_cuda or os.environ.get(VARIABLE) != "1":
        run(configs[0])
    else:
        _run_the_best(configs, run, (kernel, x.device.index, *key.items()))


def _run_the_best(
    configs: list[Config], run: Callable[[Config], None], key: tuple[Any, ...]
) -> None:
    """Any config gives the result, so timing them leaves the right one behind."""
    if key not in _best and not torch.cuda.is_current_stream_capturing():
        _best[key] = min(configs, key=lambda config: _milliseconds(config, run))
    chosen = _best.get(key, configs[0])
    try:
        run(chosen)
    except Exception:
        # found with other options of the kernel than this call has
        if chosen is configs[0]:
            raise
        _best[key] = configs[0]
        run(configs[0])


def _milliseconds(config: Config, run: Callable[[Config], None]) -> float:
    testing = importlib.import_module("triton.testing")
    try:
        return float(testing.do_bench(lambda: run(config), warmup=5, rep=25, return_mode="median"))
    except Exception:
        # it does not compile or fit here; the first one, which serves without tuning, would tell
        return float("inf")


@contextlib.contextmanager
def replaced(**configs: Config) -> Iterator[None]:
    """These configs for these kernels: small blocks let a test see several of them."""
    before = dict(_replaced)
    _replaced.update(configs)
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


@contextlib.contextmanager
def assumed(name: str, option: int | None = None) -> Iterator[None]:
    """CPU tensors are served as if on a GPU of this family, with the given option of each case."""
    global _assumed, _option
    if name not in FAMILIES:
        raise ValueError(f"fastvlm.triton.configs: no family {name!r}; there are {FAMILIES}")
    before, (_assumed, _option) = (_assumed, _option), (name, option)
    try:
        yield
    finally:
        _assumed, _option = before
