"""The decoder MLPs, and the linear projection that a decoding step is made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm import checks
from fastvlm.compat import pytorch
from fastvlm.ops._activation import number_of
from fastvlm.ops._autograd import (
    autocast,
    autocasts,
    needs_grad,
    once_differentiable,
    seed_for,
    wanted,
)
from fastvlm.ops.dispatch import define
from fastvlm.reference import mlp as reference


def _empty_grads(tensors: list[Tensor | None], x: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(tensors, needs)
    )


_LINEAR = define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
_LOW_PRECISION_LINEAR = define(
    "low_precision_linear",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor",
    reference.low_precision_linear,
    lambda x, weight, scale, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
# a planned decoding step calls it; a module of low precision is one linear layer
define(
    "low_precision_hidden",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? up, Tensor? up_scale, "
    "int activation) -> Tensor",
    reference.low_precision_hidden,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
_GELU_MLP = define(
    "gelu_mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? seed, int activation, "
    "float dropout_p, bool keep) -> (Tensor, Tensor)",
    reference.gelu_mlp,
    lambda x, w1, b1, w2, b2, seed, activation, p, keep: (
        x.new_empty(x.shape[0], w2.shape[0]),
        x.new_empty(x.shape[0], w1.shape[0]) if keep else x.new_empty(0),
    ),
)
_GELU_MLP_BACKWARD = define(
    "gelu_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor pre, Tensor w1, Tensor w2, Tensor? seed, int activation, "
    "float dropout_p, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gelu_mlp_backward,
    lambda g, x, pre, w1, w2, seed, activation, p, needs: _empty_grads(
        [x, w1, x.new_empty(w1.shape[0]), w2, x.new_empty(w2.shape[0])], x, needs
    ),
)
_GEGLU_MLP = define(
    "geglu_mlp",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int activation, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    reference.geglu_mlp,
    lambda x, w_gate, w_up, w_down, activation, keep: (
        x.new_empty(x.shape[0], w_down.shape[0]),
        *(x.new_empty(x.shape[0], w.shape[0]) if keep else x.new_empty(0) for w in (w_gate, w_up)),
    ),
)
_GEGLU_MLP_BACKWARD = define(
    "geglu_mlp_backward",
    "(Tensor grad_out, Tensor x, Tensor gate, Tensor up, Tensor w_gate, Tensor w_up, "
    "Tensor w_down, int activation, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.geglu_mlp_backward,
    lambda g, x, gate, up, w_gate, w_up, w_down, activation, needs: _empty_grads(
        [x, w_gate, w_up, w_down], x, needs
    ),
)


class _Linear(torch.autograd.Function):
    """linear whose gradients are again linear: products on our kernels, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _LINEAR(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _linear(grad_out, weight.t(), None) if needs[0] else None,
            _linear(grad_out.t(), x.t(), None) if needs[1] else None,
            grad_out.sum(0) if needs[2] else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    run = _Linear.apply if needs_grad(x, weight, bias) else _LINEAR
    out: Tensor = run(x, weight, bias)
    return out


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, *rest: Any) -> Tensor:
        seed, *settings = rest
        out, pre = _GELU_MLP(x, w1, b1, w2, b2, seed, *settings, True)
        ctx.save_for_backward(x, pre, w1, w2, seed)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:5])
        grads = _GELU_MLP_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.settings, needs)
        return (*wanted(grads, needs), None, None, None)


class _GegluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Any, w_up: Any, w_down: Any, activation: int
    ) -> Tensor:
        out, gate, up = _GEGLU_MLP(x, w_gate, w_up, w_down, activation, True)
        ctx.save_for_backward(x, gate, up, w_gate, w_up, w_down)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:4])
        grads = _GEGLU_MLP_BACKWARD(grad_out, *ctx.saved_tensors, ctx.activation, needs)
        return (*wanted(grads, needs), None)


def _features(op: str, x: Tensor) -> int:
    """The width of x, once it is known to have one."""
    checks.is_tensor(op, x=x)
    checks.is_float(op, "x", x)
    if x.dim() == 0:
        raise checks.fail(op, "x", "of shape [..., features]", x)
    return x.shape[-1]


def _check_weights(op: str, **weights: tuple[Tensor | None, list[int | None]]) -> None:
    for name, (weight, shape) in weights.items():
        if weight is None and name.startswith("b"):
            continue  # a bias may be missing
        checks.is_tensor(op, **{name: weight})
        assert weight is not None
        checks.has_shape(op, name, weight, shape)


def rows_of(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _width(weight: object, dim: int) -> int | None:
    return weight.shape[dim] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: `torch.nn.functional.linear`.

    x: [..., K]. weight: [N, K]. bias: [N] or None. One dtype. Returns [..., N].

    On the CPU a few rows stream the weight from memory once, and many go through the library whose
    product is the fastest here (`fastvlm.cpu.gemm`). Differentiable to any order.

    Raises TypeError or ValueError; the message names the argument.
    """
    op = "linear"
    if _transformed():
        return F.linear(x, weight, bias)
    if _plain_linear(x, weight, bias):
        return _as(x, _linear(rows_of(x), weight, bias))
    features = _features(op, x)
    _check_weights(op, weight=(weight, [None, features]), bias=(bias, [_width(weight, 0)]))
    if x.device.type != "cpu" and needs_grad(x, weight, bias):
        if not autocasts(x.device.type):
            checks.same_kind(op, "x", x, weight=weight, bias=bias)
        return F.linear(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    checks.same_kind(op, "x", x, weight=weight, bias=bias)
    return _as(x, _linear(rows_of(x), weight, bias))


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which PyTorch's own product knows."""
    if torch.compiler.is_compiling():
        return False
    return pytorch.is_transformed()


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is the call that a decoding step makes by the hundred, and all is right."""
    try:
        dtype = x.dtype
        return (
            x.device.type == "cpu" == weight.device.type
            and dtype in checks.FLOATS
            and weight.dtype == dtype
            and weight.dim() == 2
            and x.shape[-1] == weight.shape[1]
            and not torch.is_autocast_enabled("cpu")
            and (
                bias is None
                or (
                    bias.shape == (weight.shape[0],)
                    and bias.dtype == dtype
                    and bias.device.type == "cpu"
                )
            )
        )
    except (AttributeError, IndexError):
        return False


def _as(x: Tensor, rows: Tensor) -> Tensor:
    """Rows in the leading dimensions of x."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


def low_precision_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x weight^T + bias for a weight that is stored in fewer bits than it is computed with.

    x: [..., K] float32, bfloat16 or float16. weight: [N, K], bfloat16; or int8, then scale [N]
    float32 holds the factor of each row (`quantize_rows` makes both). bias: [N] in x's dtype, or
    None. Products and sums are float32. Returns [..., N] in x's dtype.

    For decoding: on the CPU up to 64 rows stream the stored weight from memory once; for more rows
    it is widened a block at a time. Inference only.

    Raises TypeError or ValueError, and RuntimeError where a gradient is wanted; the message names
    the argument.
    """
    op = "low_precision_linear"
    features = _features(op, x)
    rows = _width(weight, 0)
    _check_weights(op, weight=(weight, [None, features]), bias=(bias, [rows]))
    _check_storage(op, weight, scale)
    for name, tensor in {"x": x, "weight": weight, "scale": scale, "bias": bias}.items():
        if needs_grad(tensor):
            raise RuntimeError(
                f"fastvlm.{op}: {name} must not want a gradient: this op is for inference; call it "
                "under torch.inference_mode() or torch.no_grad(), or train with fastvlm.ops.linear"
            )
    x, bias = autocast(x, bias)
    checks.same_kind(op, "x", x, bias=bias)
    checks.same_device(op, "x", x, weight=weight, scale=scale)
    out: Tensor = _LOW_PRECISION_LINEAR(rows_of(x), weight, scale, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _check_storage(op: str, weight: Tensor, scale: Tensor | None) -> None:
    if weight.dtype == torch.bfloat16:
        if scale is not None:
            raise checks.fail(op, "scale", "None for a bfloat16 weight", scale)
        return
    if weight.dtype != torch.int8:
        raise checks.fail(op, "weight", "bfloat16, or int8 with a scale", weight)
    checks.is_tensor(op, scale=scale)
    assert scale is not None
    checks.has_shape(op, "scale", scale, [weight.shape[0]])
    if scale.dtype != torch.float32:
        raise checks.fail(op, "scale", "float32", scale)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and scale of `low_precision_linear` for a floating-point weight [N, K].

    Symmetric, one factor for each row: scale = max |row| / 127, and weight / scale rounded half to
    even, [N, K] int8. No gradients. Raises TypeError or ValueError.
    """
    op = "quantize_rows"
    checks.is_tensor(op, weight=weight)
    checks.is_float(op, "weight", weight)
    checks.has_shape(op, "weight", weight, [None, None])
    return reference.quantize_rows(weight.detach())


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    approximate: str | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(activation(x w1^T + b1)) w2^T + b2: the MLP of BART, Florence-2, NLLB and Marian.

    x: [..., K]. w1: [F, K], b1: [F] or None, w2: [N, F], b2: [N] or None. One dtype.
    activation: "gelu", the exact (erf) GELU; "gelu_tanh", its approximation (arXiv 1606.08415);
    "relu"; or "silu", x sigmoid(x), also called swish. approximate: "none" or "tanh", older names
    of the first two.
    dropout_p: of the activation, in [0, 1).

    Returns [..., N]. Backward keeps x w1^T + b1 [..., F] and recomputes the activation from it;
    gradients only for what wants one. A second derivative is refused (RuntimeError).

    Raises TypeError or ValueError; the message names the argument.
    """
    op = "gelu_mlp"
    features, hidden = _features(op, x), _width(w1, 0)
    _check_weights(
        op,
        w1=(w1, [None, features]),
        b1=(b1, [hidden]),
        w2=(w2, [None, hidden]),
        b2=(b2, [_width(w2, 0)]),
    )
    number = number_of(op, activation, approximate, "gelu")
    dropout_p = checks.probability(op, "dropout_p", dropout_p)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    checks.same_kind(op, "x", x, w1=w1, b1=b1, w2=w2, b2=b2)
    arguments = (rows_of(x), w1, b1, w2, b2, seed_for(x, dropout_p), number, dropout_p)
    if needs_grad(x, w1, b1, w2, b2):
        out: Tensor = _GeluMlp.apply(*arguments)
    else:
        out, _ = _GELU_MLP(*arguments, False)
    return out.view(*x.shape[:-1], w2.shape[0])


def geglu_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "gelu_tanh",
    approximate: str | None = None,
) -> Tensor:
    """(activation(x w_gate^T) * x w_up^T) w_down^T: the gated MLP of Gemma-2 and T5Gemma.

    x: [..., K]. w_gate, w_up: [F, K]. w_down: [N, F]. One dtype. activation, approximate: as in
    `gelu_mlp`; Gemma uses "gelu_tanh", SwiGLU is "silu" (arXiv 2002.05202).

    Returns [..., N]. Backward keeps the two projections [..., F] and recomputes the activation and
    the product; gradients only for what wants one. A second derivative is refused
    (RuntimeError).

    Raises TypeError or ValueError; the message names the argument.
    """
    op = "geglu_mlp"
    features, hidden = _features(op, x), _width(w_gate, 0)
    _check_weights(
        op,
        w_gate=(w_gate, [None, features]),
        w_up=(w_up, [hidden, features]),
        w_down=(w_down, [None, hidden]),
    )
    number = number_of(op, activation, approximate, "gelu_tanh")
    x, w_gate, w_up, w_down = autocast(x, w_gate, w_up, w_down)
    checks.same_kind(op, "x", x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    if needs_grad(x, w_gate, w_up, w_down):
        out: Tensor = _GegluMlp.apply(rows_of(x), w_gate, w_up, w_down, number)
    else:
        out, _, _ = _GEGLU_MLP(rows_of(x), w_gate, w_up, w_down, number, False)
    return out.view(*x.shape[:-1], w_down.shape[0])
