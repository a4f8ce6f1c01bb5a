"""Calls of attention: captions of an image in training, beams of it in decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.calls.shapes import (
    DROPOUT,
    FLORENCE,
    GEMMA,
    TRAINING,
    Build,
    empty,
    frozen,
    ints,
    seed,
)

IMAGES, CAPTIONS, KEYS, LONGEST = 8, 36, 594, 128
# shorter than the captions: one that hides nothing is left out by the launcher
WINDOW, SOFTCAP = 32, 50.0
PAST = 64
# head dimensions of other models, with a softcap and dropout together
OTHERS = ((8, 8, 96), (16, 4, 128), (8, 4, 256))


@dataclass(frozen=True)
class Options:
    """causal and window are of self-attention; few rows are the beams of a step.

    apart: the readers of an image do not stand together.
    """

    heads: tuple[int, int, int]
    rows: int
    softcap: float = 0.0
    dropout: bool = False
    causal: bool = False
    window: int = 0
    apart: bool = False

    @property
    def label(self) -> str:
        names = ("softcap", "dropout", "causal", "window", "apart")
        on = [name for name in names if getattr(self, name)]
        return f"{self.rows} x {self.heads} {' '.join(on)}".strip()


def _models() -> list[Options]:
    florence = [
        Options(heads, TRAINING, dropout=on) for heads in FLORENCE.values() for on in (False, True)
    ]
    gemma = [Options(heads, TRAINING, softcap=SOFTCAP) for heads in GEMMA.values()]
    # what transformers runs where its sdpa attention leaves the softcap out
    apart = [
        Options(FLORENCE[768], TRAINING, dropout=True, apart=True),
        *(Options(heads, TRAINING, softcap=SOFTCAP, apart=True) for heads in OTHERS),
    ]
    others = [Options(heads, TRAINING, softcap=SOFTCAP, dropout=True) for heads in OTHERS]
    return [*florence, *gemma, Options(GEMMA[2304], TRAINING), *apart, *others]


def _steps() -> list[Options]:
    of_models = [
        Options(heads, rows, softcap=cap)
        for models, cap in ((FLORENCE, 0.0), (GEMMA, SOFTCAP))
        for heads in models.values()
        for rows in (3, 32, 96)
    ]
    # 24 beams of an image
    longer = [Options(heads, 192) for heads in (FLORENCE[768], OTHERS[0])]
    return [*of_models, *longer, *(Options(heads, rows) for heads in OTHERS for rows in (32, 64))]


def _own(models: list[Options]) -> list[Options]:
    models = [o for o in models if not o.apart]
    causal = [Options(o.heads, o.rows, o.softcap, o.dropout, True) for o in models]
    windows = [
        Options(GEMMA[2304], TRAINING, SOFTCAP, False, True, WINDOW),
        # an encoder, as T5Gemma's, has windows that reach both ways
        Options(GEMMA[2304], TRAINING, SOFTCAP, False, False, WINDOW),
    ]
    # the encoder of Florence-2 reads both ways
    return [*causal, *windows, *(o for o in models if o.heads in FLORENCE.values())]


def _tensors(o: Options, own: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, kv, d = o.heads
    return empty(o.rows, h, d, dtype=dtype), empty(
        o.rows if own else IMAGES * KEYS, kv, d, dtype=dtype
    )


def _shape(o: Options, own: bool) -> tuple[Any, ...]:
    segments = IMAGES if o.rows < TRAINING else IMAGES * CAPTIONS
    longest = 1 if o.rows < TRAINING else LONGEST
    offsets, images = ints(segments + 1), ints(IMAGES + 1)
    order = torch.empty(o.rows, dtype=torch.int64) if o.apart else None
    return (
        offsets, offsets if own else images, ints(segments), order, offsets if own else images,
        seed(o.dropout), longest, longest if own else KEYS,
        longest if own else max(1, o.rows // IMAGES), o.causal, o.window, o.heads[2] ** -0.5,
        o.softcap, DROPOUT if o.dropout else 0.0,
    )  # fmt: skip


def _forward(own: bool, options: list[Options]) -> list[tuple[str, Build]]:
    def build(o: Options) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            q, k = _tensors(o, own, dtype)
            return q, k, k, *_shape(o, own)

        return args

    return [(o.label, build(o)) for o in options]


def _backward(own: bool, options: list[Options]) -> list[tuple[str, Build]]:
    def build(o: Options, needs: list[bool]) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            q, k = _tensors(o, own, dtype)
            stats = torch.empty(*q.shape[:2], 2)
            return q, q, k, k, q, stats, *_shape(o, own), needs

        return args

    # of a frozen encoder nobody wants the gradients of k and v, of a frozen q its own
    cases = [
        (o, needs)
        for o in options
        for needs in ((frozen(3),) if own else (frozen(3), frozen(3, 1, 2)))
    ]
    if not own:
        cases += [(Options(FLORENCE[768], TRAINING), frozen(3, 0)), (options[-1], frozen(3, 0))]
    return [(f"{o.label}, needs {needs}", build(o, needs)) for o, needs in cases]


def _cached() -> list[tuple[str, Build]]:
    def build(o: Options, beams: bool) -> Build:
        def args(dtype: torch.dtype) -> tuple[Any, ...]:
            h, kv, d = o.heads
            cache = empty(o.rows, PAST, kv, d, dtype=dtype)
            ancestry = ints(o.rows, PAST) if beams else None
            scale = d**-0.5
            return (
                empty(o.rows, h, d, dtype=dtype), cache, cache, ints(o.rows), ancestry, o.window,
                scale, o.softcap,
            )  # fmt: skip

        return args

    steps = [*_steps(), Options(GEMMA[2304], 32, SOFTCAP, window=WINDOW)]
    return [
        (f"{o.label}, ancestry {beams}", build(o, beams)) for o in steps for beams in (False, True)
    ]


CALLS = {
    "cross_attention": _forward(False, [*_models(), *_steps()]),
    "cross_attention_backward": _backward(False, _models()),
    "self_attention": _forward(True, _own(_models())),
    "self_attention_backward": _backward(True, _own(_models())),
    "cached_attention": _cached(),
}
