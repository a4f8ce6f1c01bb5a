"""Who does the job: transformers with either attention, compiled, OpenVINO's tower, and fastvlm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastvlm
from fastvlm.nn.linear import is_approximate
from fastvlm.nn.low_precision import stored_copy

TRANSFORMERS = ("sdpa", "eager")
OURS = "fastvlm"
KEPT = "fastvlm, features kept"
INT8 = "fastvlm, int8"


@contextlib.contextmanager
def side_of(side: str, model: Any) -> Iterator[None]:
    """The model as a side runs it: the same weights at the same addresses for all of them."""
    if side in (OURS, KEPT, INT8):
        model.set_attn_implementation("sdpa")
        bits = "int8" if side == INT8 else None
        with fastvlm.patched(model, weights=bits, compute=bits):
            _copied(model)
            yield
        return
    model.set_attn_implementation(side)
    yield


def _copied(model: Any) -> None:
    """The copies of weights in fewer bits are there, as after a first call."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_approximate(module):
            stored_copy(module, "int8")


class _Tower(nn.Module):
    """pixels -> features, and nothing else around them."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


def openvino_tower(model: Any, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The tower compiled by OpenVINO in float32. Raises whatever stands in the way."""
    # its telemetry would fork this process, threads and all
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        traced = torch.jit.trace(_Tower(model.model.vision_tower), pixels, check_trace=False)
        graph = openvino.convert_model(traced, example_input=pixels)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def compiled_tower(model: Any, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The tower through torch.compile, which takes most of a minute the first time."""
    model.set_attn_implementation("sdpa")
    tower = torch.compile(_Tower(model.model.vision_tower))
    with torch.inference_mode():
        tower(pixels)
    return tower  # type: ignore[no-any-return]
