"""An H100 that is not there, for PyTorch's compiler to generate code for.

`preloaded` builds the library that a process must be started with; inside `h100` PyTorch, its
compiler and Triton believe in the device. Nothing can be executed on it: tensors are fake.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastvlm import builder

SOURCE = Path(__file__).with_suffix(".cpp")
CXX = os.environ.get("CXX", "g++")
ARCH = "sm_90"
_H100 = SimpleNamespace(
    name="NVIDIA H100", type="cuda", index=0, major=9, minor=0, total_memory=80 << 30,
    multi_processor_count=132, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, warp_size=32, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=0, clock_rate=1980000,
    memory_clock_rate=2619000, memory_bus_width=5120, uuid="0",
)  # fmt: skip


def missing() -> str | None:
    """Why there can be no such device here."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "PyTorch's own device code is in the way: its CPU build is needed"
    if shutil.which(CXX) is None:
        return f"no {CXX} to compile {SOURCE.name}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def preloaded() -> dict[str, str]:
    """The environment of a process that has the device; compiled once."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = builder.cache_dir() / f"no-device-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        paths = [f(path) for path in cpp_extension.library_paths() for f in ("-L{}".format, _rpath)]
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [CXX, "-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(SOURCE), *paths,
             "-ltorch_cpu", "-lc10", "-o", str(made)],
            check=True,
        )  # fmt: skip
        made.replace(library)
    return {**os.environ, "LD_PRELOAD": str(library)}


def leave() -> NoReturn:
    """End a process of `preloaded` whose answers are written.

    At once: PyTorch keeps threads for a backward pass on the device that is not there, of which a
    process that ends as usual now and then dies ("terminate called without an active exception").
    """
    sys.stdout.flush()
    os._exit(0)


def _rpath(path: str) -> str:
    return f"-Wl,-rpath,{path}"


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Inside, code is generated for an H100."""
    import torch._inductor.fx_passes.fuse_attention as attention_patterns
    import torch._inductor.fx_passes.pad_mm as padding_patterns
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._dynamo.device_interface import CudaInterface
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder

    from tools.compiling.driver import driver

    # dynamo keeps a table by function, which must be that of PyTorch's own functions
    TorchInGraphFunctionVariable._get_handlers()
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    always: dict[str, Any] = {
        "current_device": 0, "device_count": 1, "synchronize": None, "set_device": None,
        "is_available": True, "is_initialized": True, "is_bf16_supported": True,
        "get_device_properties": _H100,
    }  # fmt: skip
    answers: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {
            **always, "get_device_capability": (9, 0), "get_device_name": _H100.name,
            "_lazy_init": None, "current_stream": stream, "_exchange_device": 0,
            "_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": None,
        }),
        (torch._C, dict.fromkeys(
            ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice",
             "_cuda_maybeExchangeDevice", "_cuda_setDevice"), 0,
        )),
        (CudaInterface, {
            **always, "get_compute_capability": 90, "get_raw_stream": 0, "is_triton_capable": True,
            "raise_if_triton_unavailable": None, "exchange_device": 0, "maybe_exchange_device": 0,
        }),
        (CudaInterface.Worker, {"get_device_properties": _H100, "current_device": 0}),
        (helpers, {"set_driver_to_gpu": None}),
    ]  # fmt: skip
    # constants are folded by computing them
    fold = UniformValueConstantFolder.run
    # the compiler's patterns are traced once, on tensors that are not fake
    sdpa, pad = attention_patterns._get_sfdp_patterns, padding_patterns._pad_mm_init
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for owner, values in answers:
            for name, value in values.items():
                answer = _answering(value)
                put(owner, name, staticmethod(answer) if isinstance(owner, type) else answer)
        put(torch.version, "cuda", "13.0")
        put(UniformValueConstantFolder, "run", lambda folder: _on_cpu(fold, folder))
        put(attention_patterns, "_get_sfdp_patterns", lambda *args: sdpa(cpu))
        put(padding_patterns, "_pad_mm_init", lambda *args: pad(cpu))
        stack.enter_context(driver(ARCH))
        yield


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return func(*tree_map(moved, args), **tree_map(moved, kwargs or {}))


def _on_cpu(function: Any, *args: Any) -> Any:
    with _OnCpu():
        return function(*args)


def _answering(value: Any) -> Any:
    return lambda *args, **kwargs: value
