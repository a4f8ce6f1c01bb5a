from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported. Where the cores are shared, OpenMP threads that spin at a barrier wait
# for one that is not running: a tenth of a second for each small op, half an hour for the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch.compile keeps graphs from earlier runs by the names of the ops in them: after a change of an
# op's outputs a kept graph is wrong, and the tests must compile the ops as they are
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# on a GPU: memory is poisoned by PyTorch's deterministic mode, which cuBLAS only serves like this
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import cuda_emulator
import emulator
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastvlm
from fastvlm import extension
from fastvlm.ops import dispatch

# torch.compile loads every installed backend, OpenVINO's too, whose telemetry forks this process
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
ON_GPU = torch.cuda.is_available()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triton",
        choices=("quick", "full"),
        default="quick",
        help="run every case of the Triton backend, or (quick) one in 24 of them",
    )
    parser.addoption(
        "--cuda",
        choices=("quick", "full"),
        default="quick",
        help="run every case of the CUDA kernels, or (quick) one in twelve of them",
    )
    parser.addoption(
        "--share",
        type=_share,
        metavar="I/N",
        help="part I, from 0, of all that is selected, cut into N",
    )
    parser.addoption(
        "--turn",
        type=int,
        metavar="I",
        help="of the tests that take turns only every nth, the Ith of them, from 0",
    )
    parser.addoption(
        "--spread",
        action="store_true",
        help="one in twelve of all tests first, then the next: what the time allows is a sample",
    )
    parser.addoption(
        "--as-on-gpu",
        action="store_true",
        help="collect what runs on a CUDA device, without one (with --collect-only)",
    )


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"--share: I/N with I from 0 to N - 1; got {text!r}")
    return int(found[1]), int(found[2])


def pytest_configure(config: pytest.Config) -> None:
    global ON_GPU
    if config.getoption("--as-on-gpu"):
        if not config.getoption("collectonly"):
            raise pytest.UsageError("--as-on-gpu: nothing can run; it needs --collect-only")
        ON_GPU = True


# what a test file may import at its head, and a machine may lack
OPTIONAL = ("accelerate", "hypothesis", "webdataset", "sacrebleu", "pycocoevalcap")
_left_out: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A file whose package is not here is left out, by name, and the others are collected."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text()
    for package in OPTIONAL:
        imported = re.search(rf"^(from|import) {package}\b", text, re.MULTILINE)
        if imported and importlib.util.find_spec(package) is None:
            _left_out.append(f"{collection_path.name} ({package} is not installed)")
            return True
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _left_out:
        terminalreporter.write_line(f"left out: {', '.join(_left_out)}")


# files whose tests take turns, one in so many a run, as if each were marked so: what measures and
# counts first, then what goes through many settings of one mechanism
TURNS = {
    **dict.fromkeys(
        ("test_traffic", "test_benchmark_sides", "test_benchmarks", "test_training_benchmark"), 3
    ),
    **dict.fromkeys(("test_gpu_check", "test_triton_compile"), 3),
    **dict.fromkeys(("test_load", "test_load_errors", "test_save_published"), 2),
    **dict.fromkeys(("test_check", "test_check_command"), 2),
    **dict.fromkeys(("test_instance_forwards", "test_hooks", "test_weights", "test_room"), 2),
    **dict.fromkeys(("test_frameworks", "test_skipped_gradients", "test_weight_changes"), 2),
    **dict.fromkeys(("test_int8", "test_int8_compute", "test_florenz_training"), 2),
    **dict.fromkeys(("test_caption", "test_faults", "test_ranked", "test_misuses"), 2),
    **dict.fromkeys(("test_cpu_step", "test_t5", "test_trocr", "test_registered_attention"), 2),
    **dict.fromkeys(("test_gpt2", "test_mllama", "test_llama", "test_t5gemma2"), 2),
    "test_extension": 3,
    "test_example_trainers": 2,
    **dict.fromkeys(("test_job_processes", "test_distributed", "test_accelerate"), 3),
}


# torch.compile takes up to a minute for a test: these take turns, whatever file they are in
COMPILES = re.compile(
    r"compiles?_|compile_as|torch_compile|compiled_(forward|layer|baseline)|inductor|of_a_graph"
)
COMPILE_TURNS = 6


def turns_of(item: pytest.Item) -> int:
    """One run in how many has a test, where runs take turns."""
    marked = item.get_closest_marker("turns")
    own = TURNS.get(item.path.stem, 1) if marked is None else marked.args[0]
    return max(own, COMPILE_TURNS if COMPILES.search(item.name) else 1)


# of the backends that run on a GPU, or in an emulator: why there is none of those
EMULATORS = {"triton": emulator.missing, "cuda": cuda_emulator.missing}
# one case in how many runs when quick
QUICK = {"triton": 24, "cuda": 12}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what runs on the backends for a GPU, and leaves most of it out when quick.

    Where there is a GPU the cases of an op's tests run on it, else in an emulator.
    """
    missing = {name: why() for name, why in EMULATORS.items()}
    share, turn = config.getoption("--share"), config.getoption("--turn")
    kept, left_out = [], []
    for item in items:
        parameters = getattr(item, "callspec", None)
        served = None if parameters is None else parameters.params.get("backend")
        if served in EMULATORS:
            item.add_marker(served)
            if ON_GPU:
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu") is not None and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make gpu-check)"))
        one_in = 1
        for name, why in missing.items():
            if item.get_closest_marker(name) is None or item.get_closest_marker("gpu") is not None:
                continue
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))
            if why is None and config.getoption(f"--{name}") == "quick":
                one_in = QUICK[name]
        number = zlib.crc32(item.nodeid.encode())
        wanted = number % one_in == 0
        if share is not None:
            wanted &= number % share[1] == share[0]
        if turn is not None:
            wanted &= (number - turn) % turns_of(item) == 0
        (kept if wanted else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
    if config.getoption("--spread"):
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()) % 12)


@pytest.fixture(autouse=True, scope="session")
def sanitized() -> None:
    """Under `make sanitize` the library must be the instrumented one."""
    if os.environ.get("FASTVLM_EXPECT_SANITIZERS"):
        path = extension.path()
        assert path is not None, extension.reason()
        assert b"__asan_init" in Path(path).read_bytes(), f"{path} is not instrumented"


# folders of tests on tiny models, which gain nothing from threads; threads that spin slow their
# neighbours down, and children that come about by fork must not find any
ONE_THREAD = ("captioning", "checking", "decoding", "features", "florenz", "packing", "patching")


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    if request.path.parent.name in ONE_THREAD:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh random inputs for each test, the same again for the same test."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory from torch.empty is NaN, so a kernel that leaves some of it unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    # the setting has no effect where someone switched the filling off
    assert torch.empty(1).isnan()
    assert torch.ones(1).half().new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on(backend: str) -> Iterator[Callable[..., Any]]:
    """Call an op on the backend of the test, which serves its backward pass too.

    A case that the kernels do not serve is skipped with their reason: nothing but the reference
    is left, and its own case tests that. EXPECTED_CPU in test_dispatch.py is what they must serve.
    Triton and CUDA kernels run on the GPU where there is one, on copies of the arguments, and in an
    emulator where there is none.
    """
    on_gpu = backend in EMULATORS and ON_GPU

    def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = op.__name__
        if backend not in ("reference", *dispatch.OPS[name].kernels):
            pytest.skip(f"{name} has no {backend} kernel")
        try:
            if on_gpu:
                args, kwargs = _moved((args, kwargs), "cuda")
                return _moved(op(*args, **kwargs), "cpu")
            return op(*args, **kwargs)
        except dispatch.BackendError as error:
            if backend == "reference":
                raise
            pytest.skip(str(error))

    contexts = {"triton": emulator.emulated, "cuda": cuda_emulator.emulated}
    emulated = backend in EMULATORS and not on_gpu
    with contexts[backend]() if emulated else fastvlm.use(backend):
        yield call


def _moved(values: Any, device: str) -> Any:
    """Tensors and layouts on another device; gradients flow back through the copies."""
    return tree_map(
        lambda x: x.to(device) if isinstance(x, (Tensor, fastvlm.Layout)) else x, values
    )


@pytest.fixture
def randn(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal values in the dtype under test."""

    def make(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_(grad)

    return make
