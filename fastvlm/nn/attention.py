"""Attention modules over packed rows, for a model of one's own."""

from __future__ import annotations

from torch import Tensor, nn

from fastvlm import ops
from fastvlm.layout import Layout
from fastvlm.nn.linear import Linear


class _Projections(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        kv_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        bias: bool,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"fastvlm.nn.{type(self).__name__}: num_kv_heads must divide num_heads "
                f"({num_heads}); got {num_kv_heads}"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.q_proj = Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(kv_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(kv_size, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = Linear(num_heads * self.head_dim, hidden_size, bias=bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class CrossAttention(_Projections):
    """Caption rows read the tokens of their image; K/V of an image exist once for all readers.

    hidden_size: width of the queries and of the result. kv_size: width of the image tokens
    (default hidden_size). State: q_proj, k_proj, v_proj, out_proj. scale, softcap, dropout_p: as in
    `fastvlm.ops.cross_attention`; dropout in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_size: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
    ):
        kv_size = hidden_size if kv_size is None else kv_size
        super().__init__(hidden_size, kv_size, num_heads, num_kv_heads, head_dim, bias)
        self.scale, self.softcap, self.dropout_p = scale, softcap, dropout_p

    def forward(self, x: Tensor, image_tokens: Tensor, layout: Layout) -> Tensor:
        """x [Tq, hidden_size], image_tokens [Tk, kv_size] -> [Tq, hidden_size]."""
        out = ops.cross_attention(
            self._heads(self.q_proj(x)),
            self._heads(self.k_proj(image_tokens)),
            self._heads(self.v_proj(image_tokens)),
            layout,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return self.out_proj(out.flatten(1))


class SelfAttention(_Projections):
    """Attention inside each packed segment, with optional RoPE.

    State: q_proj, k_proj, v_proj, out_proj. causal, window, scale, softcap, dropout_p: as in
    `fastvlm.ops.self_attention`; dropout in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
    ):
        super().__init__(hidden_size, hidden_size, num_heads, num_kv_heads, head_dim, bias)
        self.causal, self.window = causal, window
        self.scale, self.softcap, self.dropout_p = scale, softcap, dropout_p

    def forward(
        self, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]; rotary: cos and sin [T, R] of `ops.rope`."""
        q, k = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        if rotary is not None:
            q, k = ops.rope(q, k, *rotary)
        out = ops.self_attention(
            q,
            k,
            self._heads(self.v_proj(x)),
            layout,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return self.out_proj(out.flatten(1))
