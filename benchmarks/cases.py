"""The one registry of shapes: what a decoding step of Florence-2 and Gemma-2 is made of.

The models are those of arXiv 2503.09443 (section 1 of its tables): the decoders of Florence-2-base
and -large, and Gemma-2-2B and -9B with cross-attention inserted in each layer. Rows of a step:
1 greedy, 3 the beams of one image (Florence-2's default), 32 the 4 beams of 8 images.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 3, 32)
# 577 image tokens at 768 px and a prompt of 17 with its special tokens
KEYS = 594


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


DECODERS = (
    Decoder("florence2-base", 768, 12, 12, 64, 3072, vocabulary=51289),
    Decoder("florence2-large", 1024, 16, 16, 64, 4096),
    Decoder("gemma2-2b", 2304, 8, 4, 256, 9216, gated=True, softcap=50.0),
    Decoder("gemma2-9b", 3584, 16, 8, 256, 14336, gated=True, softcap=50.0),
)


@dataclass(frozen=True)
class LinearCase:
    """rows x inputs -> rows x outputs."""

    name: str
    rows: int
    inputs: int
    outputs: int
    bias: bool

    def bytes_moved(self, size: int) -> int:
        """What must be read and written at least, at `size` bytes an element."""
        bias = self.outputs if self.bias else 0
        weight = self.inputs * self.outputs
        return size * (weight + bias + self.rows * (self.inputs + self.outputs))

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class MlpCase:
    """gated: GeGLU (tanh) without biases, as Gemma-2; else GELU (erf) with them, as BART."""

    name: str
    rows: int
    width: int
    hidden: int
    gated: bool

    def bytes_moved(self, size: int) -> int:
        weights = (3 if self.gated else 2) * self.width * self.hidden
        biases = 0 if self.gated else self.hidden + self.width
        return size * (weights + biases + 2 * self.rows * self.width)

    @property
    def flops(self) -> int:
        return 2 * self.rows * (3 if self.gated else 2) * self.width * self.hidden


@dataclass(frozen=True)
class AttentionCase:
    """A step of cross-attention: every beam of an image reads the same keys, counted once."""

    name: str
    images: int
    beams: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None

    @property
    def rows(self) -> int:
        return self.images * self.beams

    def bytes_moved(self, size: int) -> int:
        kv = 2 * self.images * self.keys * self.kv_heads * self.head_dim
        return size * (kv + 2 * self.rows * self.heads * self.head_dim)

    @property
    def flops(self) -> int:
        return 4 * self.rows * self.keys * self.heads * self.head_dim


Case = LinearCase | MlpCase | AttentionCase


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
    return [
        MlpCase(f"mlp-{d.name}-{rows}", rows, d.width, d.hidden, d.gated)
        for d in DECODERS
        for rows in ROWS
    ]


def _attention() -> list[AttentionCase]:
    return [
        AttentionCase(
            f"attention-{d.name}-{images}x{beams}",
            images,
            beams,
            KEYS,
            d.heads,
            d.kv_heads,
            d.head_dim,
            d.softcap,
        )
        for d in DECODERS
        for images, beams in ((1, 3), (8, 4))
    ]


LINEAR = _linear()
MLP = _mlp()
ATTENTION = _attention()
ALL: list[Case] = [*LINEAR, *MLP, *ATTENTION]
CASES = {case.name: case for case in ALL}
