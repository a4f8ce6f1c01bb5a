"""The planned step as one CUDA graph: captured once for a cache, replayed at every step.

What changes from step to step lies in tensors of fixed address and shape: the embedded tokens, the
position that is written, the lengths, where the beams are, RoPE's cosines and sines. Caches are
given to the ops in their full capacity, so that a graph holds until they grow. Off unless
FASTVLM_CUDA_GRAPHS=1 asks for it: it has not run on a GPU yet.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvlm.compat import pytorch

VARIABLE = "FASTVLM_CUDA_GRAPHS"
Run = Callable[[], Tensor]
Step = Callable[[Tensor, Any], Tensor]


class Waits(RuntimeError):
    """A step that asks the device for a value cannot be captured."""


class Recorder(Protocol):
    """What captures a function of no arguments that works on tensors that stay where they are."""

    def rehearse(self, run: Run) -> Tensor:
        """Call it as it is. Raises Waits where it waits for the device."""

    def capture(self, run: Run) -> Run:
        """A function that does again what run does, at once and to the same tensors.

        Capturing computes nothing. What it gives is overwritten at the next call.
        """


class CudaGraph:
    """`torch.cuda.CUDAGraph` of a function; its intermediate tensors have a pool of their own."""

    def rehearse(self, run: Run) -> Tensor:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run()
        except RuntimeError as error:
            if "synchronizing" in str(error):
                raise Waits(str(error)) from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        # other threads (a loader that pins memory) may go on meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def recorder(x: Tensor) -> Recorder | None:
    """What captures a step of rows x; None where steps are to be called op by op."""
    if not x.is_cuda or os.environ.get(VARIABLE) != "1":
        return None
    # a dispatch mode watches the ops; a capture around this one takes them as they come
    if pytorch.is_watched() or torch.cuda.is_current_stream_capturing():
        return None
    return CudaGraph()


class CapturedStep:
    """A step whose first call runs as it is, on the tensors of the captured ones: it compiles
    kernels and loads libraries, which a capture must not. The second captures. Where the first
    waits for the device (plain PyTorch's attention, for heads that no kernel takes), none is.

    It keeps nothing of the plan whose step it is: a cache that nobody needs is to go at once.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._replay: Run | None = None
        self._refused = False

    def __call__(
        self, step: Step, recorder: Recorder, x: Tensor, at: Any, layers: list[Any]
    ) -> Tensor:
        """step(x, at): x [R, d], at: `run.step.StepInputs` -> [R, d]; layers of the cache."""
        if self._refused:
            return step(x, at)
        # held, not named by address: no other tensor can come to lie where one of these does
        held = [t for layer in layers for t in (layer.k, layer.v)]
        held += [*at.where, x.shape, x.dtype, x.device, torch.is_inference_mode_enabled()]
        known = len(held) == len(self._held) and all(map(_same, held, self._held))
        if not known:
            self._replay = None  # its memory, before the next one takes as much
            self._held, self._fixed = held, _Fixed(x, at, layers[0].k.shape[1])
        fixed = self._fixed
        fixed.fill(x, at)
        if not known:
            try:
                return recorder.rehearse(lambda: step(fixed.x, fixed.at))
            except Waits as why:
                self._refused, self._held = True, []
                warnings.warn(f"fastvlm: steps are not captured: {why}", stacklevel=2)
                return step(x, at)
        with torch.cuda.device(x.device if x.is_cuda else -1):
            if self._replay is None:
                self._replay = recorder.capture(lambda: step(fixed.x, fixed.at))
            return self._replay().clone()


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


class _Fixed:
    """The tensors of a captured step, for caches of some capacity."""

    def __init__(self, x: Tensor, at: Any, capacity: int) -> None:
        rows, device = x.shape[0], x.device
        self._own = torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1)
        self.x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.at = at._replace(
            # beyond the lengths nobody reads it
            ancestry=self._own.repeat(1, capacity),
            lengths=torch.empty_like(at.lengths),
            start=torch.zeros(1, dtype=torch.int64, device=device),
            rotation=tuple(torch.empty_like(t, memory_format=torch.contiguous_format)
                           for t in at.rotation),
        )  # fmt: skip

    def fill(self, x: Tensor, at: Any) -> None:
        ancestry = self._own if at.ancestry is None else at.ancestry
        self.x.copy_(x)
        self.at.ancestry[:, : at.start + 1].copy_(ancestry)
        self.at.lengths.copy_(at.lengths)
        self.at.start.fill_(at.start)
        for ours, theirs in zip(self.at.rotation, at.rotation):
            ours.copy_(theirs)
