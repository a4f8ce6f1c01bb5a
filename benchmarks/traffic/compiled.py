"""torch.compile's side: layers and steps of transformers, compiled in a process of their own.

``python -m benchmarks.traffic.compiled`` reads jobs from its input, one JSON object a line, and
answers each with one: `count` starts it with a device that is not there (`no_device`).

transformers' attention is sdpa where the model allows it (Florence-2's decoder), the better start
for the compiler; Gemma-2's softcap leaves eager.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Decoder
from benchmarks.traffic import counter, no_device
from benchmarks.traffic.inputs import Decoding, Training, Work, padded

Job = dict[str, Any]
SIDE = "torch.compile"


def layer_job(d: Decoder, work: Work) -> Job:
    return {"decoder": asdict(d), type(work).__name__: asdict(work)}


def step_job(config: Any, work: Decoding) -> Job:
    """config: a FlorenzConfig."""
    return {"florenz": config.to_dict(), "Decoding": asdict(work)}


def count(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """forward, backward (launches, bytes, kernels), graphs and breaks of each job."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.traffic.compiled"],
        input="\n".join(map(json.dumps, jobs)), env=no_device.preloaded(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"torch.compile's side failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _on_cuda(module: nn.Module) -> None:
    """Parameters and buffers of device "meta" become fake ones on "cuda"; tied ones stay tied."""
    made: dict[int, Any] = {}

    def fake(x: torch.Tensor) -> Any:
        if id(x) not in made:
            y = torch.empty(x.shape, dtype=x.dtype, device="cuda")
            is_parameter = isinstance(x, nn.Parameter)
            made[id(x)] = nn.Parameter(y, x.requires_grad) if is_parameter else y
        return made[id(x)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = fake(x)


def _layer(job: Job, work: Work) -> tuple[Any, Callable[[Any], None]]:
    """The module, of device "meta", and what runs it once it is on the other."""
    from benchmarks.traffic import layers

    d = Decoder(**job["decoder"])
    with torch.device(counter.DEVICE):
        layer = layers.layer_of(d, "sdpa").bfloat16()
    if isinstance(work, Decoding):
        layer.eval().requires_grad_(False)

    def step(layer: Any) -> None:
        x = padded(d, work, "cuda")
        run = torch.compile(layer.transformers, dynamic=False)
        if isinstance(work, Decoding):
            with torch.no_grad():
                run(x)
        else:
            out = run(x)
            out.backward(torch.empty_like(out))

    return layer, step


def _step(job: Job, work: Decoding) -> tuple[Any, Callable[[Any], None]]:
    from benchmarks.traffic import steps
    from fastvlm.florenz import FlorenzConfig

    config = FlorenzConfig(**job["florenz"])

    def whole(model: Any, x: steps.Inputs) -> Any:
        return steps.head(model, steps.states(model, x), x.scores)

    def step(model: Any) -> None:
        x = steps.inputs_of(config, work, work.beams, "cuda")
        steps.fill_caches(model, x, work)
        with torch.no_grad(), steps.known_lengths(compiling=True):
            torch.compile(whole, dynamic=False)(model, x)

    return steps.model_of(config, "sdpa"), step


def _answer(job: Job) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.traffic import inductor

    kind = Decoding if "Decoding" in job else Training
    work: Any = kind(**job[kind.__name__])
    module, step = (_layer if "decoder" in job else _step)(job, work)
    with FakeTensorMode(allow_non_fake_inputs=True), counter.as_on_cuda():
        _on_cuda(module)
        with inductor.counted() as found:
            step(module)
    answer = {"forward": found.forward.numbers(), "graphs": found.graphs, "breaks": found.breaks}
    if found.backward.launches:
        answer["backward"] = found.backward.numbers()
    return answer


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
    no_device.leave()
