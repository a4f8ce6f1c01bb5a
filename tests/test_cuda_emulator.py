"""The emulator finds what it is there to find, under every schedule, and no fault where none is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import cuda_emulator
import pytest
import torch

pytestmark = pytest.mark.cuda
N = 512
Run = Callable[[str], str | None]

FAULTS = {
    "reads_outside": "a read of 4 bytes outside of everything, 0 bytes from in",
    "writes_outside": "a write of 4 bytes outside of everything, 0 bytes from out",
    "writes_to_its_input": "a write to in, which is an input",
    "unaligned": "an unaligned access of 16 bytes",
    "blocks_write_one_element": "a race: out[0] is written",
    "no_barrier_before": "shared[",
    "no_barrier_after": "a race: shared[",
    "reads_what_nobody_wrote": "] is read, which nobody has written",
    "reads_its_result": "] is read, which nobody has written",
    "half_of_a_warp_shuffles": "no thread can go on",
    "one_warp_waits": "no thread can go on",
    "barriers_apart": "meet",
    "no_wait": "where a copy is under way",
    "no_meeting": "shared[",
    "copies_over_what_is_read": "a race: shared[",
    "no_fence_before": "a race: out[",
    "no_fence_after": "a race: out[",
    "no_barrier_before_the_fence": "a race: out[",
    "writes_after_the_fence": "a race: out[",
    "writes_to_a_counter": "a plain access to counters",
    "leaves_a_count": "a counter is not 0 behind the launch",
    "counts_outside": "a count outside of all counters",
}
CLEAN = ("copies", "neighbours", "asynchronous", "matrices_in_one_bank", "matrices_moved",
         "last_comes", "handed_over", "handed_over_to_another")  # fmt: skip


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    to = tmp_path_factory.mktemp("planted") / "planted.so"
    engine = cuda_emulator.engine()
    source = Path(__file__).parent / "cuda" / "planted.cu"
    library = cuda_emulator.folder() / "libengine.so"
    cuda_emulator.compile_watched(source, to, library, f"-I{cuda_emulator.sources()}")
    assert engine is not None
    loaded = ctypes.CDLL(str(to))
    loaded.planted_run.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=cuda_emulator.SCHEDULES)
def run(request: pytest.FixtureRequest, planted: ctypes.CDLL, seed: int) -> Run:
    cuda_emulator.engine().emulator_settings(cuda_emulator.SCHEDULES.index(request.param), seed)

    def call(name: str) -> str | None:
        x, out = torch.randn(N), torch.empty(N)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
        words = planted.planted_run(getattr(planted, f"planted_{name}"), *pointers, N)
        return None if words is None else words.decode()

    return call


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_right_passes(name: str, run: Run) -> None:
    assert run(name) is None


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, run: Run) -> None:
    words = run(name)
    assert words is not None
    assert FAULTS[name] in words
    assert words.startswith(f"{name}, block (")
    # a fault leaves nothing behind, and no counts
    assert run("copies") is None
    assert run("last_comes") is None


def test_bank_conflicts_are_counted(run: Run) -> None:
    for name, conflicts in (("matrices_in_one_bank", 4 * 7), ("matrices_moved", 0)):
        cuda_emulator.reset_counts()
        assert run(name) is None
        assert cuda_emulator.counts()["bank_conflicts"] == conflicts
