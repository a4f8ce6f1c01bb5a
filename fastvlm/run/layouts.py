"""From a padded transformers batch to the Layouts that the patched attention modules read.

A patched stack (encoder or decoder) builds them once per forward pass and hands them down as one
keyword argument, which transformers' layers pass on to their attention modules. So there is no
ambient state: a block that is recomputed in backward gets the same layouts again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlm.layout import Layout
from fastvlm.loss.request import Packed, loss_request
from fastvlm.run import static
from fastvlm.run.seen import Seen
from fastvlm.run.static import Static

KEYWORD = "fastvlm_layouts"
# keyword argument of a patched model: int64 [B], the encoder row that each decoder row reads
READERS = "prompt_of_target"
_warned = False  # of zeros that no mask hides


class Marks:
    """Which parts of a stack took their layouts in one call: ids of its attentions and layers.

    unknown: a compiled part did, which notes no names: each note would be a guard of its graph.
    """

    def __init__(self) -> None:
        self.attentions: set[int] = set()
        self.layers: set[int] = set()
        self.unknown = False


@dataclass(frozen=True)
class Layouts:
    """What an attention module needs to know of the batch.

    rows: the query rows reading themselves (training, prefill); None for a decoding step.
    cross: the query rows reading the encoder; None without one.
    visible: int32 [batch, T] for a decoding step over a padded batch: the cache row of each
        position, -1 where there is padding (`fastvlm.ops.cached_attention`).
    fused_self: False where self-attention stays with transformers, mask included (several new
        tokens on a filled cache).
    packed: the whole stack runs on the tokens alone: hidden states are [1, tokens, d], the
        encoder's states too, and padding is neither computed nor differentiated.
    seen: of cross, where a text's rows may each see other keys of its image.
    static: of a call with transformers' StaticCache, which has no layouts.
    last: the layer behind which a stack's own head reads the padded grid; None where there is none.
    marks: who took them; None where nobody counts (a static cache, whose mask goes along).
    """

    rows: Layout | None = None
    cross: Layout | None = None
    visible: Tensor | None = None
    fused_self: bool = True
    packed: bool = False
    seen: Seen | None = None
    static: Static | None = None
    last: Any = None
    marks: Marks | None = field(default_factory=Marks)

    @property
    def has_cross(self) -> bool:
        """Whether the query rows read an encoder."""
        return self.cross is not None or (self.static is not None and self.static.cross is not None)

    def fuses(self, mask: Any, states: Tensor) -> bool:
        """Whether a layer's self-attention over states [B, L, d] is an op of ours."""
        if self.static is not None:
            return static.serves(mask, states.shape[1])
        return self.fused_self

    def enter(self, x: Tensor) -> Tensor:
        """Hidden states as the layers have them: a packed stack's first layer packs [B, L, d]."""
        rows = self.rows
        if not self.packed or rows is None or x.shape[:2] == (1, rows.num_tokens):
            return x
        return rows.pack(x).unsqueeze(0)

    def leave(self, x: Tensor, layer: Any) -> Tensor:
        """Hidden states as what is behind a layer has them: a head in the stack finds [B, L, d],
        zeros at padding."""
        rows = self.rows
        if self.last is not layer or rows is None:
            return x
        padding = rows.q_padding
        return x if padding is None or padding.index is None else rows.unpack(self.pack(x))

    def ancestry(self, moved: Tensor | None) -> Tensor | None:
        """What a step's rows read of the cache, whose own table is moved (None: each itself)."""
        seen = self.visible
        if seen is None:
            return moved
        return seen if moved is None else torch.where(seen < 0, seen, moved)

    def pack(self, x: Tensor) -> Tensor:
        """What a layer has of each query row, [B, L, ...] or [1, tokens, ...] -> [tokens, ...]."""
        return x.flatten(0, 1) if self.packed else self._queries().pack(x)

    def unpack(self, y: Tensor) -> Tensor:
        """[tokens, ...] -> as the layers have it."""
        return y.unsqueeze(0) if self.packed else self._queries().unpack(y)

    def _queries(self) -> Layout:
        layout = self.cross if self.rows is None else self.rows
        assert layout is not None
        return layout

    def packed_states(self, encoder_states: Tensor) -> Tensor:
        """The encoder's states as the layers get them -> [encoder tokens, d]."""
        assert self.cross is not None
        packed = self.packed or self.seen is not None
        return encoder_states.flatten(0, 1) if packed else self.cross.pack_kv(encoder_states)


class Handed(NamedTuple):
    """Layouts in the place of an argument that a stack passes to its layers: for the stack, that
    argument is False."""

    layouts: Layouts

    def __bool__(self) -> bool:
        return False


def hand(arguments: dict[str, Any], layouts: Layouts, by: str | None) -> None:
    """Put layouts among the arguments of a stack's own forward. by: `Stack.hands`."""
    arguments[KEYWORD if by is None else by] = layouts if by is None else Handed(layouts)


def received(given: dict[str, Any], by: str | None) -> dict[str, Any]:
    """What a layer was given, its layouts under their own name. by: `Layer.handed`."""
    handed = None if by is None else given.get(by)
    if by is None or not isinstance(handed, Handed):
        return given
    return {**given, by: False, KEYWORD: handed.layouts}


def taken(kwargs: dict[str, Any], attention: Any) -> Layouts | None:
    """Take what a stack hands down to an attention out of its keyword arguments, and say so."""
    layouts: Layouts | None = kwargs.pop(KEYWORD, None)
    if layouts is not None and layouts.marks is not None:
        if torch.compiler.is_compiling():
            layouts.marks.unknown = True
        else:
            layouts.marks.attentions.add(id(attention))
    return layouts


def entered(kwargs: Mapping[str, Any], layer: Any) -> Layouts | None:
    """What a stack hands down to a layer, which says so."""
    layouts: Layouts | None = kwargs.get(KEYWORD)
    compiling = torch.compiler.is_compiling()
    if layouts is not None and layouts.marks is not None and not compiling:
        layouts.marks.layers.add(id(layer))
    return layouts


def wants_attentions(module: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller asks for attention probabilities, which no fused kernel materialises."""
    asked = kwargs.get("output_attentions")
    return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)


def wants_hidden_states(module: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller asks for the output of each layer, on the padded grid."""
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(module.config, "output_hidden_states", False) if asked is None else asked)


def packed_positions(position_ids: Tensor | None, rows: Layout) -> Tensor:
    """position_ids [1 or B, L] of the tokens, [1, tokens]; the column where none are given."""
    grid = rows.q_padding
    assert grid is not None
    if position_ids is None:
        position_ids = torch.arange(grid.length, device=rows.device).unsqueeze(0)
    return rows.pack(position_ids.expand(grid.batch, grid.length)).unsqueeze(0)


def restarts(position_ids: Tensor | None) -> bool:
    """Whether positions begin anew within a row: a collator that puts texts one behind another."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return False
    return bool((position_ids[..., 1:] <= position_ids[..., :-1]).any())


def is_2d(mask: object) -> bool:
    """A mask this module understands: none, or [batch, length]."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def grid_of(
    input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[int, int, torch.device]:
    """Rows, columns and device of what a stack is given."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        return 0, 0, torch.device("cpu")
    return given.shape[0], given.shape[1], given.device


def ones(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool, device=device)


def hides(mask: Tensor | None) -> bool:
    """Whether a mask leaves anything out; one without values (meta) does not."""
    return mask is not None and not mask.is_meta and not bool((mask != 0).all())


def warn_of_zeros(states: Tensor) -> None:
    """Say once that a decoder reads the zeros of padding, for want of the mask they were made with.

    states: of an encoder, [I, S, d]. Looks at one number of each row where that suffices.
    """
    global _warned
    if _warned or torch.compiler.is_compiling() or not bool((states[..., 0] == 0).any()):
        return
    if bool((states == 0).all(-1).any()):
        _warned = True
        warnings.warn(
            "fastvlm: encoder_outputs hold the zeros that a patched encoder gives for padding, and "
            "no mask hides them, so the decoder reads them; pass the attention_mask that the "
            "encoder was given",
            stacklevel=2,
        )


def needs_columns(stack: Any, mask: Tensor | None) -> bool:
    """Whether distances count padded columns that packing would take out.

    Padding at either end shifts all distances alike; padding between tokens does not, and matters
    to a bias of the distance, and where a sliding window is shorter than the text.
    """
    window = getattr(stack.config, "sliding_window", None)
    if mask is None:
        return False
    if not stack.spec.has_bias and (window is None or window >= mask.shape[1]):
        return False
    tokens = mask != 0
    starts = tokens[:, 0].long() + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    return bool((starts > 1).any())


def visible_positions(mask: Tensor | None) -> Tensor | None:
    """The ancestry of `cached_attention` for rows that read their own cache row, -1 for padding."""
    if mask is None:
        return None
    rows = torch.arange(mask.shape[0], dtype=torch.int32, device=mask.device).unsqueeze(1)
    return torch.where(mask != 0, rows, -1)


def zero_padding(output: Any, layouts: Layouts) -> Any:
    """The stack's output on the padded grid, zeros where transformers leaves any value."""
    rows = layouts.rows
    if rows is None or rows.q_padding is None or rows.q_padding.index is None:
        return output
    states = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
    tokens = layouts.pack(layouts.enter(states))
    states = rows.unpack(tokens)
    request = loss_request()
    if request is not None:
        request.packed = Packed(states, tokens, rows.q_padding.index)
    if isinstance(output, tuple):
        return (states, *output[1:])
    output["last_hidden_state"] = states
    return output
