"""Two attentions of the same queries to keys that are apart, as one softmax over all of them.

With a = logsumexp of a row's scores over one set of keys, and b over the other, the softmax over
both gives the first set sigmoid(a - b) of its weight and the second the rest: so two results with
their logsumexp are enough (FlashAttention's split of the keys, arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.reference.attention import LOG2E, compute_dtype


def lse_of(stats: Tensor) -> Tensor:
    """The logsumexp [T, H] of what an attention keeps of its rows, stats [T, H, 2] (see
    `fastvlm.reference.attention.attention`); -inf where a row sees no key."""
    largest, total = stats.unbind(-1)
    return largest / LOG2E + total.log()


def _share(lse: Tensor, other_lse: Tensor) -> Tensor:
    """The weight of the keys behind lse in the softmax over both; 0 where a row sees none."""
    difference = (lse - other_lse).masked_fill(lse.isneginf(), float("-inf"))
    return torch.sigmoid(difference)


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """out, other [T, H, D], with lse, other_lse [T, H] -> [T, H, D]; zeros for a row that sees no
    key in either."""
    dtype = compute_dtype(out)
    share, rest = _share(lse, other_lse), _share(other_lse, lse)
    both = out.to(dtype) * share.unsqueeze(-1) + other.to(dtype) * rest.unsqueeze(-1)
    return both.to(out.dtype).contiguous()


def merge_attention_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of out, other and lse; that of other_lse is the negative of the last."""
    dtype = compute_dtype(out)
    grad = grad_out.to(dtype)
    share, rest = _share(lse, other_lse), _share(other_lse, lse)
    of_lse = share * rest * (grad * (out.to(dtype) - other.to(dtype))).sum(-1)
    of_out, of_other = (
        (grad * part.unsqueeze(-1)).to(out.dtype).contiguous() for part in (share, rest)
    )
    return of_out, of_other, of_lse.contiguous()
