"""What kinds of work are measured, and what each must move and compute at least: its floor.

`bytes_moved` counts each operand read once and each result written once per pass, `flops` the
matrix products; both are what no implementation can go below, not what ours does. A training case
is a forward and a backward pass with the gradients of every floating operand.
"""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("float32", "bfloat16")
SINGLE = ("float32",)


class _Kind:
    """What a kind says of all its cases."""

    # in which it is measured on a CPU
    dtypes: tuple[str, ...] = BOTH
    # weights of a step come from memory; what only reads what the op before has just written is
    # measured as it is found then, in the cache where it fits
    cold: bool = True
    trains: bool = False

    def baseline_bytes(self, size: int) -> int | None:
        """bytes_moved of the baseline, where its operands are larger by construction."""
        return None


@dataclass(frozen=True)
class LinearCase(_Kind):
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
class MlpCase(_Kind):
    """gated: GeGLU (tanh) without biases, as Gemma-2; else GELU (erf) with them, as BART.

    engines: compared with the inference engines too, which hold copies of the weights.
    """

    name: str
    rows: int
    width: int
    hidden: int
    gated: bool
    engines: bool = False
    trains: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:  # type: ignore[override]
        """None in training, whose products take seconds on a CPU."""
        return () if self.trains else BOTH

    def bytes_moved(self, size: int) -> int:
        weights = (3 if self.gated else 2) * self.width * self.hidden
        biases = 0 if self.gated else self.hidden + self.width
        # a backward pass reads and writes what it has gradients of
        return size * (1 + 2 * self.trains) * (weights + biases + 2 * self.rows * self.width)

    @property
    def flops(self) -> int:
        one = 2 * self.rows * (3 if self.gated else 2) * self.width * self.hidden
        return one * (1 + 2 * self.trains)


@dataclass(frozen=True)
class AttentionCase(_Kind):
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

    def _bytes(self, size: int, copies: int) -> int:
        kv = 2 * copies * self.keys * self.kv_heads * self.head_dim
        return size * (kv + 2 * self.rows * self.heads * self.head_dim)

    def bytes_moved(self, size: int) -> int:
        return self._bytes(size, self.images)

    def baseline_bytes(self, size: int) -> int:
        return self._bytes(size, self.rows)

    @property
    def flops(self) -> int:
        return 4 * self.rows * self.keys * self.heads * self.head_dim


# six products of [queries, keys, head_dim] in a forward and a backward pass: scores and output;
# and the gradients of v, the probabilities, q and k
_PRODUCTS = 6


@dataclass(frozen=True)
class CaptionsCase(_Kind):
    """Attention in training: captions of several lengths, packed. keys: of an image, which
    captions of it share in a row (cross-attention); None: causal self-attention."""

    name: str
    images: int
    lengths: tuple[int, ...]
    keys: int | None
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None

    dtypes = SINGLE
    trains = True

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def captions(self) -> int:
        """Of one image."""
        return len(self.lengths) // self.images

    def bytes_moved(self, size: int) -> int:
        kv_rows = self.rows if self.keys is None else self.images * self.keys
        q = self.rows * self.heads * self.head_dim
        kv = 2 * kv_rows * self.kv_heads * self.head_dim
        # q and the output, then q again and both gradients; k and v twice and their gradients
        return size * (5 * q + 3 * kv)

    @property
    def flops(self) -> int:
        seen = sum(n * (n + 1) // 2 if self.keys is None else n * self.keys for n in self.lengths)
        return 2 * _PRODUCTS * seen * self.heads * self.head_dim


class _Elementwise(_Kind):
    dtypes = SINGLE
    cold = False
    flops = 0


# activations [rows, width] that each op must read and write: in the forward pass, and in both
_NORM_PASSES = {
    "rms_norm": (2, 5),
    "residual_rms_norm": (4, 10),
    "residual_layer_norm": (3, 8),
}


@dataclass(frozen=True)
class NormCase(_Elementwise):
    """op: the function's name in fastvlm.ops; its weights are too small to count."""

    name: str
    rows: int
    op: str
    width: int
    trains: bool = False

    def bytes_moved(self, size: int) -> int:
        return size * _NORM_PASSES[self.op][self.trains] * self.rows * self.width


@dataclass(frozen=True)
class RopeCase(_Elementwise):
    """Queries and keys turned by their positions."""

    name: str
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    trains: bool = False

    def bytes_moved(self, size: int) -> int:
        tables = 2 * self.rows * self.head_dim
        turned = 2 * self.rows * (self.heads + self.kv_heads) * self.head_dim
        return size * (1 + self.trains) * (tables + turned)


@dataclass(frozen=True)
class LossCase(_Kind):
    """Cross-entropy of a head; counted: the rows that are not ignored, the only ones with work."""

    name: str
    rows: int
    width: int
    vocabulary: int
    softcap: float | None
    counted: int
    on_gpu_only: bool = False

    trains = True

    @property
    def dtypes(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.on_gpu_only else SINGLE

    def bytes_moved(self, size: int) -> int:
        # read by the forward pass and again by the backward pass, which writes the gradients
        return size * 3 * (self.vocabulary + self.rows) * self.width

    @property
    def flops(self) -> int:
        return 3 * 2 * self.counted * self.width * self.vocabulary


@dataclass(frozen=True)
class TopkCase(_Kind):
    """The k most probable tokens of a head, with their log-probabilities."""

    name: str
    rows: int
    width: int
    vocabulary: int
    softcap: float
    k: int

    def bytes_moved(self, size: int) -> int:
        return size * (self.vocabulary + self.rows) * self.width

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.width * self.vocabulary


@dataclass(frozen=True)
class VisionCase(_Kind):
    """A whole vision tower. flops: as PyTorch's FlopCounterMode counts them, of the image alone: at
    224 px transformers computes 41.8 GFLOP, the rest of them for the padding of windows."""

    name: str
    rows: int
    image_size: int
    parameters: int
    flops: int

    dtypes = SINGLE
    cold = False

    def bytes_moved(self, size: int) -> int:
        return size * (self.parameters + 3 * self.image_size**2)


Case = (
    LinearCase | MlpCase | AttentionCase | CaptionsCase | NormCase | RopeCase | LossCase
    | TopkCase | VisionCase
)  # fmt: skip
