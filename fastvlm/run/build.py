"""A stack's decoding step, written down from the specs of its layers, and run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from fastvlm.compat import hf
from fastvlm.decoding import cache as cross_cache
from fastvlm.decoding import rows as beam_cache
from fastvlm.models.spec import Attention, Layer, Mlp, Residual, Stack
from fastvlm.models.structure import layers_of, part_of
from fastvlm.nn.norm import is_plain_rms_norm
from fastvlm.nn.wrapped import owns
from fastvlm.run.attention import scale_of, softcap_of, window_of
from fastvlm.run.embedded import embeds_alike
from fastvlm.run.embedding import StepEmbedding, check_embedding, rotation_of, ways_to_turn
from fastvlm.run.layer import run_layer
from fastvlm.run.program import NotCompilable, Program, ensure, has_no_hooks
from fastvlm.run.step import STEPS, DecodeStep


def build_step(stack: Any, past: Any) -> DecodeStep | None:
    """The step of a patched stack for its prefilled cache; None where modules must be called.

    A layer's last norm also makes what the first norm after it would, the next layer's or the
    stack's: one launch for two.
    """
    try:
        return DecodeStep(stack, _write(stack, past))
    except NotCompilable:
        return None


def run_step(
    stack: Any,
    ids: Tensor,
    past: Any,
    layouts: Any,
    position_ids: Tensor | None,
    arguments: Callable[[], dict[str, Any]],
) -> Tensor | None:
    """ids [R, 1] -> states [R, 1, d] by the step of a prefilled cache, which is made at the first.

    None where modules must be called. arguments: with which the stack's own forward embeds ids.
    """
    filled = past.get_seq_length()
    steps = STEPS.setdefault(past, {})
    if id(stack) not in steps or ((known := steps[id(stack)]) is not None and known.is_stale):
        made = build_step(stack, past)
        if made is not None and not embeds_alike(
            stack, arguments(), StepEmbedding(stack)(ids, filled, position_ids)
        ):
            made = None
        steps[id(stack)] = made
    step = steps[id(stack)]
    if step is None or step.stack() is not stack:
        return None
    x = StepEmbedding(stack)(ids, filled, position_ids)
    return step(x, layouts, rotation_of(stack, x, position_ids, filled)).unsqueeze(1)


def _write(stack: Any, past: Any) -> Program:
    spec: Stack = stack.spec
    check_embedding(stack)
    ensure(spec.rotary is None or has_no_hooks(getattr(stack, spec.rotary)))
    layers = [(i, layer, _spec_of(layer, Layer)) for i, layer in enumerate(layers_of(stack))]
    if spec.interleaved:  # a layer that reads images is left out where there are none
        layers = [each for each in layers if _reads_what_is_there(*each, past)]
    firsts = [each.residuals[0].before for _, _, each in layers]
    following = [None if n is None else part_of(m, n) for (_, m, _), n in zip(layers, firsts)][1:]
    following.append(None if spec.norm is None else getattr(stack, spec.norm))
    program = Program(part_of(stack, spec.embedding.tokens).weight.shape[1])
    ways = ways_to_turn(stack)
    h, normed, bias = 0, None, None
    for (index, layer, each), behind in zip(layers, following):
        writer = _Writer(program, layer, each, past, index, bias, ways)
        h, normed = run_layer(writer, layer, each.residuals, h, normed, behind)
        bias = writer.position_bias
    return program


def _reads_what_is_there(index: int, layer: Any, spec: Layer, past: Any) -> bool:
    reads = any(residual.reads == "cross" for residual in spec.residuals)
    kept = cross_cache.cross_layer(past, index) if reads else None
    return not reads or (kept is not None and kept.packed is not None)


def _spec_of(module: Any, kind: Any) -> Any:
    """By which a patched module is run, if a call would run nothing else."""
    found = getattr(type(module), "spec", None)
    ensure(isinstance(found, kind) and has_no_hooks(module))
    return found


class _Writer:
    """A `fastvlm.run.layer.Runner` that writes instructions: rows are numbers of registers."""

    def __init__(
        self,
        program: Program,
        layer: Any,
        spec: Layer,
        past: Any,
        index: int,
        position_bias: Tensor | None,
        ways: list[str],
    ) -> None:
        self.program, self.layer, self.index, self.ways = program, layer, index, ways
        self.position_bias = position_bias
        self.past = self.own = past
        if isinstance(past, EncoderDecoderCache):
            self.own = past.self_attention_cache
        paths = {spec.dropout, *(residual.dropout for residual in spec.residuals)}
        for dropout in (part_of(layer, path) for path in paths if path is not None):
            ensure(not isinstance(dropout, nn.Module) or has_no_hooks(dropout))
        # there modules look behind each branch for what is infinite
        half = any(p.dtype == torch.float16 for p in layer.parameters())
        ensure(spec.clamps != "infinite" or not half)

    def norm(self, x: int, norm: Any) -> int:
        return self._norm(x, norm)[0]

    def _norm(
        self, x: int, norm: Any, residual: int | None = None, gate: Tensor | None = None
    ) -> list[int]:
        """norm(x); with residual residual + tanh(gate) * x, and the norm of that."""
        if isinstance(norm, nn.LayerNorm):
            ensure(gate is None)
            return self.program.layer_norm(x, norm, residual)
        ensure(is_plain_rms_norm(norm))
        return self.program.rms_norm(x, norm.weight, norm.eps, norm.offset, residual, gate=gate)

    def branch(self, x: int, residual: Residual) -> int:
        if isinstance(residual.branch, Mlp):
            return self.program.mlp(x, self.layer, residual.branch)
        part = part_of(self.layer, residual.branch)
        if residual.reads == "mlp":
            return self.program.mlp(x, part, _spec_of(part, Mlp))
        spec = _spec_of(part, Attention)
        ensure(spec.out_dropout is None or has_no_hooks(getattr(part, spec.out_dropout)))
        attend = self._cross_attention if residual.reads == "cross" else self._self_attention
        y = attend(x, part, spec)
        outs = [] if spec.out is None else [getattr(part, spec.out)]
        if residual.project is not None:
            outs.append(part_of(self.layer, residual.project))
        for out in outs:
            (y,) = self.program.linear(y, out)
        return y

    def _self_attention(self, x: int, part: Any, spec: Attention) -> int:
        if spec.fused is not None:
            q, k, v = self.program.linear(x, getattr(part, spec.fused), parts=3)
        else:
            q, k, v = self.program.linear(x, part.q_proj, part.k_proj, part.v_proj)
        if spec.norms is not None:
            q, k = (self._normed_heads(y, part, name) for y, name in zip((q, k), spec.norms))
        if spec.rotary:
            way = 0 if spec.way is None else self.ways.index(getattr(part, spec.way))
            q, k = self.program.rope(q, k, part.head_dim, way)
        cache = beam_cache.layer_of(self.own, self.index)
        ensure(cache.k is not None)  # a layer that the stack leaves out, by its configuration
        window = window_of(part, spec)
        if isinstance(window, tuple):  # of rows that see what comes
            raise NotCompilable
        numbers = scale_of(part, spec), window, softcap_of(part, spec)
        if spec.merged:
            image = cross_cache.cross_layer(self.past, self.index)
            ensure(image is not None)
            return self.program.merged_attention(q, k, v, part, cache, image, *numbers)
        return self.program.self_attention(
            q, k, v, part, cache, *numbers, self._bias_of(part, spec)
        )

    def _normed_heads(self, x: int, part: Any, name: str) -> int:
        """x, each of its heads normalized by itself."""
        norm = getattr(part, name)
        ensure(is_plain_rms_norm(norm))
        heads = self.program.widths[x] // part.head_dim
        return self.program.rms_norm(x, norm.weight, norm.eps, norm.offset, parts=heads)[0]

    def _bias_of(self, part: Any, spec: Attention) -> Tensor | None:
        """A copy: what is written into its table makes the program stale."""
        if spec.bias is None or not owns(part, spec.bias):
            return self.position_bias
        table = getattr(part, spec.bias)
        ensure(has_no_hooks(table) and type(table.weight) is nn.Parameter)
        ensure(not (table.weight.is_meta or table.weight.is_inference()))
        self.program.copied.append(table.weight)
        with torch.no_grad():
            bias = hf.bias_of_distances(part)
        if spec.shares_bias:
            self.position_bias = bias
        return bias

    def _cross_attention(self, x: int, part: Any, spec: Attention) -> int:
        cache = cross_cache.cross_layer(self.past, self.index)
        ensure(cache is not None)
        (q,) = self.program.linear(x, part.q_proj)
        if spec.norms is not None:
            q = self._normed_heads(q, part, spec.norms[0])
        return self.program.cross_attention(q, cache, scale_of(part, spec), softcap_of(part, spec))

    def join(self, x: int, h: int, residual: Residual, following: Any) -> tuple[int, int | None]:
        if residual.norm is not None:
            norm = part_of(self.layer, residual.norm)
            ensure(residual.after is None and residual.gate is None and following is None)
            return self.program.residual_layer_norm(x, h, norm), None
        if residual.after is None:  # a sum is an instruction with the norm of it
            ensure(following is not None)
            gate = None if residual.gate is None else getattr(self.layer, residual.gate)
            h, normed = self._norm(x, following, h, gate)
            return h, normed
        after = getattr(self.layer, residual.after)
        norms = [after] if following is None else [after, following]
        ensure(all(map(is_plain_rms_norm, norms)))
        ensure(len({(norm.eps, norm.offset) for norm in norms}) == 1)
        h, *behind = self.program.residual_rms_norm(
            x,
            h,
            after.weight,
            eps=after.eps,
            offset=after.offset,
            gate=None if residual.gate is None else getattr(self.layer, residual.gate),
            next_weight=None if following is None else following.weight,
        )
        return h, behind[0] if behind else None
