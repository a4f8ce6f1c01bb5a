"""Who does the job: transformers with either attention, compiled, OpenVINO's tower, and fastvlm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastvlm
from benchmarks import engines
from fastvlm.nn.compute import unavailable
from fastvlm.nn.linear import is_approximate
from fastvlm.nn.low_precision import stored_copy

TRANSFORMERS = ("sdpa", "eager")
OURS = "fastvlm"
KEPT = "fastvlm, features kept"
INT8 = "fastvlm, int8"
BF16 = "fastvlm, bf16"  # arithmetic and weights of a model in float32
NARROW = {INT8: "int8", BF16: "bf16"}
# of a model whose weights are bfloat16, and of one in float32 that is trained under autocast
IN_BF16 = ", model in bf16"
AUTOCAST = ", bf16 autocast"


def narrow() -> dict[str, str | None]:
    """The sides in fewer bits, and why one cannot be had."""
    return {side: unavailable(bits) for side, bits in NARROW.items()}


def forward_of(side: str) -> contextlib.AbstractContextManager[Any]:
    """What the forward of a training step runs under."""
    autocasts = side.endswith(AUTOCAST)
    return torch.autocast("cpu", torch.bfloat16) if autocasts else contextlib.nullcontext()


@contextlib.contextmanager
def side_of(side: str, model: Any) -> Iterator[None]:
    """The model as a side runs it: the same weights at the same addresses for all of them."""
    side = side.removesuffix(IN_BF16).removesuffix(AUTOCAST)
    if side in (OURS, KEPT, *NARROW):
        model.set_attn_implementation("sdpa")
        bits = NARROW.get(side)
        with fastvlm.patched(model, weights=bits, compute=bits):
            if bits is not None:
                _copied(model)
            yield
        return
    model.set_attn_implementation(side)
    yield


def _copied(model: Any) -> None:
    """The copies of weights in fewer bits are there, as after a first call."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and is_approximate(module):
            stored_copy(module, module.compute or module.storage)


class _Tower(nn.Module):
    """pixels -> features, and nothing else around them."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.tower(pixels).last_hidden_state
        return features


def openvino_tower(
    model: Any, pixels: Tensor, precision: str = "f32"
) -> Callable[[Tensor], Tensor]:
    """The tower compiled by OpenVINO: float32, or "bf16" arithmetic. Raises whatever stands in the
    way."""
    import openvino

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        traced = torch.jit.trace(_Tower(model.model.vision_tower), pixels, check_trace=False)
        graph = openvino.convert_model(traced, example_input=pixels)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = engines.openvino_core().compile_model(graph, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def compiled_tower(model: Any, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The tower through torch.compile, which takes most of a minute the first time."""
    model.set_attn_implementation("sdpa")
    tower = torch.compile(_Tower(model.model.vision_tower))
    with torch.inference_mode():
        tower(pixels)
    return tower  # type: ignore[no-any-return]
