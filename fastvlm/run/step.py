"""The planned decoding step of a stack: its program (`fastvlm.run.program`), and who runs it.

On the CPU one call runs all of it; elsewhere, and where a backend is forced or a dispatch mode
watches the ops, they are called one by one, or replayed (`fastvlm.run.graphs`). What the plan
is of is looked at when it is made: a hook, an adapter or another parameter that comes while a cache
is being filled is seen by the next. What is written into a parameter is seen at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastvlm.cpu.step import CpuStep
from fastvlm.nn.weight_mark import WrittenTo
from fastvlm.ops.attention import arguments_of
from fastvlm.reference.merge import lse_of
from fastvlm.reference.mlp import activated
from fastvlm.run import graphs
from fastvlm.run.layouts import wants_attentions, wants_hidden_states
from fastvlm.run.program import Instruction, Program, has_no_hooks

Registers = list[Any]  # the registers, each rows [R, n]
_OPS = torch.ops.fastvlm


class StepInputs(NamedTuple):
    """What all layers of a step share.

    ancestry: int32 [R, T], the cache row of each position, -1 where it is padding; None where each
    row reads itself. lengths: int32 [R]. start: the position that is written; int64 [1] in a
    captured step, where T is the capacity of the caches. where: `arguments_of` the layout of
    cross-attention. rotation: cos and sin of RoPE, [R, head_dim] each, for each way to turn.
    """

    ancestry: Tensor | None
    lengths: Tensor
    start: int | Tensor
    where: tuple[Any, ...]
    rotation: tuple[Tensor, ...]


OpCall = Callable[[Registers, StepInputs], Any]


class Ran(NamedTuple):
    """A step that has run: what it gave, [R, d], and what it was given."""

    out: Tensor
    layouts: Any
    rotation: Any


class DecodeStep:
    """The step of one stack for one cache. layers: its self-attention caches. last: the one that
    ran last."""

    def __init__(self, stack: Any, program: Program):
        self.stack, self.layers = weakref.ref(stack), program.layers
        instructions = _fused(program.instructions)
        self._calls = [_call(i, program.layers) for i in instructions]
        self._registers = len(program.widths)
        self._results = [i.results for i in instructions]
        self._on_cpu = CpuStep(program.instructions, program.widths)
        self._captured = graphs.CapturedStep()
        self.last: Ran | None = None
        # parameters are read where they lie, but for copies of them in fewer bits
        self.is_stale = WrittenTo(program.copied)

    def __call__(self, x: Tensor, layouts: Any, rotation: Any) -> Tensor:
        """x [R, d], the embedded tokens -> [R, d], the stack's last states."""
        out = self._run(x, layouts, rotation)
        self.last = Ran(out, layouts, rotation)
        return out

    def _run(self, x: Tensor, layouts: Any, rotation: Any) -> Tensor:
        start = self.layers[0].filled
        for layer in self.layers:
            layer.reserve(1)
        rows = self.layers[0].rows
        ancestry = layouts.ancestry(rows.ancestry)
        where = () if layouts.cross is None else arguments_of(layouts.cross)
        at = StepInputs(ancestry, rows.lengths, start, where, rotation)
        recorder = graphs.recorder(x)
        if recorder is not None:
            return self._captured(self._called, recorder, x, at, self.layers)
        if self._on_cpu.serves(x):
            return self._on_cpu(x, at, self.layers)
        return self._called(x, at)

    def _called(self, x: Tensor, at: StepInputs) -> Tensor:
        """The step op by op."""
        registers: Registers = [x] + [None] * (self._registers - 1)
        for call, results in zip(self._calls, self._results):
            found = call(registers, at)
            for result, value in zip(results, found):
                registers[result] = value
        out: Tensor = registers[-1]
        return out


# beside the caches, not in them: a cache is copied, saved and kept
STEPS: WeakKeyDictionary[Any, dict[int, DecodeStep | None]] = WeakKeyDictionary()


def is_plain_step(stack: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but the next states."""
    if wants_attentions(stack, kwargs) or wants_hidden_states(stack, kwargs):
        return False
    if kwargs.get("return_dict") not in (None, True) or torch.compiler.is_compiling():
        return False
    return not (stack.training or torch.is_grad_enabled()) and has_no_hooks(stack)


def _fused(instructions: list[Instruction]) -> list[Instruction]:
    """The same, with each activation in the int8 products before it where one op does both.

    On the CPU it stays two instructions, between which nothing is written to memory.
    """
    found: list[Instruction] = []
    for instruction in instructions:
        before = found[-1] if found else None
        if before is not None and _activates(instruction, before):
            # of a second product its bias, which is none, is left out
            tensors = (*before.tensors[:5], None, None)[:5]
            found[-1] = Instruction(
                "low_precision_hidden",
                instruction.results,
                before.rows,
                tensors,
                instruction.settings,
            )
        else:
            found.append(instruction)
    return found


def _activates(instruction: Instruction, before: Instruction) -> bool:
    """Whether it is the activation of all that int8 products before it have made."""
    if instruction.op != "activate" or before.op != "linear" or instruction.rows != before.results:
        return False
    int8 = all(scale is not None for scale in before.tensors[1::3])
    return int8 and all(bias is None for bias in before.tensors[5::3])


def _call(instruction: Instruction, layers: list[Any]) -> OpCall:
    """The schemas that do what an instruction says -> its results."""
    _, _, rows, tensors, settings = instruction
    first, last = rows[0], rows[-1]
    match instruction.op:
        case "linear":
            return _linear(instruction)
        case "gelu_mlp":
            gelu, number, transposed = _OPS.gelu_mlp.default, int(settings[0]), settings[1]
            w1, b1, w2, b2 = cast("tuple[Any, ...]", tensors)
            if transposed:
                return lambda r, at: gelu(
                    r[first], w1.t(), b1, w2.t(), b2, None, number, 0.0, False
                )
            return lambda r, at: gelu(r[first], *tensors, None, number, 0.0, False)
        case "geglu_mlp":
            geglu, number = _OPS.geglu_mlp.default, int(settings[0])
            return lambda r, at: geglu(r[first], *tensors, number, False)
        case "low_precision_hidden":
            hidden, number = _OPS.low_precision_hidden.default, int(settings[0])
            return lambda r, at: [hidden(r[first], *tensors, number)]
        case "activate":
            number = int(settings[0])
            if len(rows) == 1:
                return lambda r, at: [activated(r[first], number)]
            return lambda r, at: [activated(r[first], number) * r[last]]
        case "residual_layer_norm":
            norm, (eps,) = _OPS.residual_layer_norm.default, settings
            return lambda r, at: [norm(r[first], r[last], *tensors, None, eps, 0.0)]
        case "layer_norm":
            return _layer_norm(instruction)
        case "rms_norm":
            return _rms_norm(instruction)
        case "residual_rms_norm":
            tail = _OPS.residual_rms_norm.default
            return lambda r, at: tail(r[first], r[last], *tensors, *settings)
        case "rope":
            rope, shape, pair = _OPS.rope.default, (-1, int(settings[0])), 2 * int(settings[1])
            return lambda r, at: [
                turned.flatten(1)
                for turned in rope(
                    *(r[i].unflatten(1, shape) for i in rows), *at.rotation[pair : pair + 2]
                )
            ]
        case "self_attention":
            return _self_attention(instruction, layers)
        case "cross_attention":
            keys: Any = tensors[0]
            shape = (-1, keys.shape[2])
            cross, (scale, softcap) = _OPS.cross_attention.default, settings
            asked = False, 0, scale, softcap, 0.0
            return lambda r, at: [
                cross(r[first].unflatten(1, shape), *tensors, *at.where, *asked)[0].flatten(1)
            ]
        case "merged_attention":
            return _merged_attention(instruction, layers)
    raise AssertionError(instruction.op)


def _linear(instruction: Instruction) -> OpCall:
    (first,), tensors, (transposed,) = instruction.rows, instruction.tensors, instruction.settings
    triples = range(0, len(tensors), 3)
    products = [_product(*tensors[i : i + 3], transposed=bool(transposed)) for i in triples]
    parts = len(instruction.results) // len(products)
    if parts == 1:
        return lambda r, at: [product(r[first]) for product in products]
    return lambda r, at: [
        part for product in products for part in product(r[first]).chunk(parts, -1)
    ]


def _layer_norm(instruction: Instruction) -> OpCall:
    first, *residual = instruction.rows
    norm, (eps,) = _OPS.residual_layer_norm.default, instruction.settings

    def run(r: Registers, at: StepInputs) -> list[Tensor]:
        x = r[first]
        h = r[residual[0]] if residual else torch.zeros_like(x)
        y = norm(x, h, *instruction.tensors, None, eps, 0.0)
        return [h + x, y] if residual else [y]

    return run


def _rms_norm(instruction: Instruction) -> OpCall:
    first, *residual = instruction.rows
    norm, (weight, gate) = _OPS.rms_norm.default, instruction.tensors
    *settings, parts = instruction.settings

    def run(r: Registers, at: StepInputs) -> list[Tensor]:
        x = r[first]
        if parts > 1:
            heads = x.reshape(int(parts) * x.shape[0], -1)
            return [norm(heads, weight, *settings).view(x.shape)]
        if not residual:
            return [norm(x, weight, *settings)]
        h = r[residual[0]] + (x if gate is None else (torch.tanh(gate) * x).to(x.dtype))
        return [h, norm(h, weight, *settings)]

    return run


def _product(
    weight: Any, scale: Tensor | None, bias: Tensor | None, *, transposed: bool
) -> Callable[[Tensor], Any]:
    linear, narrow = _OPS.linear.default, _OPS.low_precision_linear.default

    def product(x: Tensor) -> Tensor:
        w = weight.t() if transposed else weight
        if scale is None and w.dtype == x.dtype:
            return linear(x, w, bias)
        return narrow(x, w, scale, bias)

    return product


def _self_attention(instruction: Instruction, layers: list[Any]) -> OpCall:
    (q, k, v), (dim, number, window, scale, softcap) = instruction.rows, instruction.settings
    layer, shape = layers[int(number)], (-1, int(dim))
    attend, settings = _OPS.cached_attention.default, (int(window), scale, softcap)
    bias = instruction.tensors

    def run(r: Registers, at: StepInputs) -> list[Tensor]:
        keys, values = layer.write(at.start, *(r[i].unflatten(1, shape) for i in (k, v)))
        query = r[q].unflatten(1, shape)
        return [attend(query, keys, values, at.lengths, at.ancestry, *settings, *bias).flatten(1)]

    return run


def _merged_attention(instruction: Instruction, layers: list[Any]) -> OpCall:
    (q, k, v), (dim, number, window, scale, softcap) = instruction.rows, instruction.settings
    layer, shape = layers[int(number)], (-1, int(dim))
    own, cross = _OPS.cached_attention_lse.default, _OPS.cross_attention.default
    settings, asked = (int(window), scale, softcap), (False, 0, scale, softcap, 0.0)
    image, merge = instruction.tensors, _OPS.merge_attention.default

    def run(r: Registers, at: StepInputs) -> list[Tensor]:
        keys, values = layer.write(at.start, *(r[i].unflatten(1, shape) for i in (k, v)))
        query = r[q].unflatten(1, shape)
        first = own(query, keys, values, at.lengths, at.ancestry, *settings)
        other, stats = cross(query, *image, *at.where, *asked)
        return [merge(*first, other, lse_of(stats)).flatten(1)]

    return run
