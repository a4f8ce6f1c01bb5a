"""What users run instead of PyTorch: ONNX Runtime and OpenVINO, and torch.compile.

Each is optional; one that cannot be had is left out and named in the results file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.kinds import MlpCase

# without it OpenVINO falls back to reporting nothing; with it, a fork of this process, threads and
# all, goes to the network. Whatever imports OpenVINO first would load it
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
OPSET, IR_VERSION = 20, 10
# "0" lets ONNX Runtime's threads sleep between its calls instead of waiting busily on the cores
# that the next side is timed on; on 2 cores "1" made it slower alone too (9.7 to 15.6 ms for
# 6.1 to 8.4 ms, GeGLU MLP of Gemma-2-2B at 1 and 8 rows)
SPINNING = "0"

Session = Callable[[Tensor], Tensor]


def versions() -> dict[str, str]:
    found = {}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def available(engine: str) -> bool:
    for package in PACKAGES[engine]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            measure.MISSING[engine] = f"{package}: {error}"
            return False
    return True


def geglu_model(case: MlpCase, gate: Tensor, up: Tensor, down: Tensor) -> bytes:
    """The gated MLP as an ONNX graph with float32 weights, laid out for MatMul."""
    from onnx import TensorProto, helper, numpy_helper

    def weight(name: str, value: Tensor) -> Any:
        return numpy_helper.from_array(value.float().t().contiguous().numpy(), name)

    def rows(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.rows, case.width])

    nodes = [
        helper.make_node("MatMul", ["x", "w_gate"], ["gate"]),
        helper.make_node("Gelu", ["gate"], ["activated"], approximate="tanh"),
        helper.make_node("MatMul", ["x", "w_up"], ["up"]),
        helper.make_node("Mul", ["activated", "up"], ["product"]),
        helper.make_node("MatMul", ["product", "w_down"], ["y"]),
    ]
    weights = [weight("w_gate", gate), weight("w_up", up), weight("w_down", down)]
    graph = helper.make_graph(nodes, "geglu", [rows("x")], [rows("y")], weights)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def onnxruntime_session(model: bytes) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", SPINNING)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.float().numpy()})[0])

    return run


@functools.cache
def openvino_core() -> Any:
    """One for the process, which keeps it.

    On a CPU with AMX each one makes its own memory the stack that signal handlers run on, and when
    it goes away it puts back what it had found: of two that go in the order in which they came,
    memory that is no longer there. The next signal, such as that of a child that ends, then ends
    the process.
    """
    import openvino

    return openvino.Core()


def openvino_session(model: bytes) -> Session:
    core = openvino_core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        request.infer([x.float().numpy()], share_inputs=True)
        # the next call writes over the same memory
        return torch.from_numpy(request.get_output_tensor().data)

    return run


_SESSIONS = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def names(dtype: torch.dtype) -> list[str]:
    """The engines to compare with. OpenVINO only with float32 weights: beside bfloat16 ones the
    question is what reading twice the bytes costs, and one engine answers it."""
    wanted = PACKAGES if dtype == torch.float32 else ("onnxruntime",)
    return [name for name in wanted if available(name)]


def geglu_sessions(case: MlpCase, weights: tuple[Tensor, ...]) -> dict[str, Session]:
    """One session an engine, each with its own float32 copy of the weights."""
    found = names(weights[0].dtype)
    if not found:
        return {}
    model = geglu_model(case, *weights)
    return {name: _SESSIONS[name](model) for name in found}


def compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """{"torch.compile": function, compiled}, or nothing where there is no compiler."""
    # Inductor takes the compiler's path alone: of "ccache g++" the last word
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if shutil.which(compiler) is None:
        measure.MISSING["torch.compile"] = f"no C++ compiler ({compiler})"
        return {}
    from torch._inductor import config

    config.cpp.cxx = (None, compiler)
    # what was compiled for the last case counts against the limit of recompilations, past which
    # the function would run as it is
    torch._dynamo.reset()
    return {"torch.compile": torch.compile(function, dynamic=False, fullgraph=True)}
