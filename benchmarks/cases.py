"""The one registry of shapes: Florence-2 and Gemma-2 in decoding and in training.

The models are those of arXiv 2503.09443 (section 1 of its tables): the decoders of Florence-2-base
and -large, and Gemma-2-2B and -9B with cross-attention inserted in each layer. Rows of a step:
1 greedy, 3 the beams of one image (Florence-2's default), 32 the 4 beams of 8 images. In training,
4 images with 12 captions each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.kinds import (
    AttentionCase,
    CaptionsCase,
    Case,
    LinearCase,
    LossCase,
    MlpCase,
    NormCase,
    RopeCase,
    TopkCase,
    VisionCase,
)

ROWS = (1, 3, 32)
# where the better way of computing changes; only for the MLP that the targets are about
ENGINE_ROWS = (1, 3, 4, 8, 16, 32)
# 577 image tokens at 768 px and a prompt of 17 with its special tokens
KEYS = 594
IMAGES, CAPTIONS, SHORTEST, LONGEST = 4, 12, 10, 128
TRAINING_ROWS = 2304
# of a packed batch on a GPU
MANY = 4096


@dataclass(frozen=True)
class Decoder:
    """Widths of one decoder layer; vocabulary 0: its head is not among the cases."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = False
    softcap: float | None = None
    vocabulary: int = 0
    engines: bool = False


FLORENCE_BASE = Decoder("florence2-base", 768, 12, 12, 64, 3072, vocabulary=51289)
FLORENCE_LARGE = Decoder("florence2-large", 1024, 16, 16, 64, 4096)
GEMMA_2B = Decoder("gemma2-2b", 2304, 8, 4, 256, 9216, gated=True, softcap=50.0, engines=True)
GEMMA_9B = Decoder("gemma2-9b", 3584, 16, 8, 256, 14336, gated=True, softcap=50.0)
DECODERS = (FLORENCE_BASE, FLORENCE_LARGE, GEMMA_2B, GEMMA_9B)


def _linear() -> list[LinearCase]:
    cases = []
    for d in DECODERS:
        bias = not d.gated
        shapes = {"q": (d.width, d.heads * d.head_dim)}
        if d.gated:
            shapes["kv"] = (d.width, d.kv_heads * d.head_dim)
            shapes["out"] = (d.heads * d.head_dim, d.width)
        for kind, (inputs, outputs) in shapes.items():
            for rows in ROWS:
                name = f"linear-{d.name}-{kind}-{rows}"
                cases.append(LinearCase(name, rows, inputs, outputs, bias))
        if d.vocabulary:
            for rows in ROWS:
                name = f"linear-{d.name}-head-{rows}"
                cases.append(LinearCase(name, rows, d.width, d.vocabulary, False))
    return cases


def _mlp() -> list[MlpCase]:
    steps = [
        MlpCase(f"mlp-{d.name}-{rows}", rows, d.width, d.hidden, d.gated, d.engines)
        for d in DECODERS
        for rows in (ENGINE_ROWS if d.engines else ROWS)
    ]
    training = [
        MlpCase(f"mlp-train-{d.name}-{MANY}", MANY, d.width, d.hidden, d.gated, trains=True)
        for d in (FLORENCE_LARGE, GEMMA_2B)
    ]
    return [*steps, *training]


def _attention() -> list[AttentionCase]:
    def step(name: str, d: Decoder, images: int, beams: int, cap: float | None) -> AttentionCase:
        name = f"{name}-{d.name}-{images}x{beams}"
        return AttentionCase(name, images, beams, KEYS, d.heads, d.kv_heads, d.head_dim, cap)

    cases = [
        step("attention", d, images, beams, d.softcap)
        for d in DECODERS
        for images, beams in ((1, 3), (8, 4))
    ]
    # without the softcap that keeps transformers from sdpa, which is the stronger baseline
    return [*cases, step("attention-plain", GEMMA_2B, 8, 4, None)]


def _captions() -> list[CaptionsCase]:
    draw = random.Random(0)
    lengths = tuple(draw.randint(SHORTEST, LONGEST) for _ in range(IMAGES * CAPTIONS))

    def case(name: str, d: Decoder, keys: int | None) -> CaptionsCase:
        return CaptionsCase(name, IMAGES, lengths, keys, d.heads, d.kv_heads, d.head_dim, d.softcap)

    return [
        case("attention-train-cross-florence2-large", FLORENCE_LARGE, KEYS),
        case("attention-train-cross-gemma2-2b", GEMMA_2B, KEYS),
        case("attention-train-self-gemma2-2b", GEMMA_2B, None),
    ]


def _norm() -> list[NormCase]:
    widths = {"rms_norm": GEMMA_2B, "residual_rms_norm": GEMMA_2B}
    cases = []
    for op, d in {**widths, "residual_layer_norm": FLORENCE_BASE}.items():
        for rows in (3, 32, TRAINING_ROWS):
            cases.append(NormCase(f"norm-{op}-{d.width}-{rows}", rows, op, d.width))
        name = f"norm-train-{op}-{d.width}-{TRAINING_ROWS}"
        cases.append(NormCase(name, TRAINING_ROWS, op, d.width, trains=True))
    return cases


def _rope() -> list[RopeCase]:
    d = GEMMA_2B
    heads = (d.heads, d.kv_heads, d.head_dim)
    cases = [RopeCase(f"rope-{d.name}-{rows}", rows, *heads) for rows in (3, 32, TRAINING_ROWS)]
    train = RopeCase(f"rope-train-{d.name}-{TRAINING_ROWS}", TRAINING_ROWS, *heads, trains=True)
    return [*cases, train]


LINEAR = _linear()
MLP = _mlp()
ATTENTION = _attention()
CAPTIONS_ATTENTION = _captions()
NORM = _norm()
ROPE = _rope()
# 40 % of the rows count: the others are prompt and padding
LOSS = [
    LossCase("loss-256000", 512, 768, 256_000, 30.0, 205),
    LossCase(f"loss-train-256000-{MANY}", MANY, 2304, 256_000, 30.0, 1638, on_gpu_only=True),
]
# PaliGemma 2's vocabulary; a beam search of 4 beams takes 8
TOPK = [TopkCase("loss-topk-257024-32", 32, 768, 257_024, 30.0, 8)]
VISION = [
    VisionCase("vision-florence2-base-224", 49, 224, 90_368_000, 32_132_894_720),
    VisionCase("vision-florence2-base-768", 576, 768, 90_368_000, 379_775_877_120),
]
ALL: list[Case] = [
    *LINEAR, *MLP, *ATTENTION, *CAPTIONS_ATTENTION, *NORM, *ROPE, *LOSS, *TOPK, *VISION
]  # fmt: skip
CASES = {case.name: case for case in ALL}
