"""Florence-2's embedding over Gemma's vocabulary (arXiv 2503.09443, section 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import fail

_OP = "florenz.remapped_embedding"
_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")


def remapped_embedding(
    weight: Tensor,
    florence_tokenizer: Any,
    gemma_tokenizer: Any,
    vocab_size: int,
    *,
    std: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    """weight [V_florence, d] -> [vocab_size, d]: rows for Gemma's tokens made of Florence-2's.

    The row of a token is the mean of the rows of the pieces into which Florence-2's tokenizer cuts
    its text (with a space for Gemma's word mark). bos, eos, unk and pad become each other; other
    special tokens, texts without a piece and rows beyond the tokenizer are N(0, std).
    generator: a CPU generator for these. The result has weight's dtype and device.

    ValueError: vocab_size below len(gemma_tokenizer).
    """
    tokens = len(gemma_tokenizer)
    if not isinstance(vocab_size, int) or vocab_size < tokens:
        wanted = f"at least len(gemma_tokenizer), {tokens}"
        raise fail(_OP, "vocab_size", wanted, vocab_size)
    pieces = _pieces(florence_tokenizer, gemma_tokenizer, tokens)
    lengths = torch.tensor([len(p) for p in pieces])
    rows = torch.repeat_interleave(torch.arange(tokens), lengths)
    flat = torch.tensor([i for p in pieces for i in p], dtype=torch.long)
    table = torch.randn(vocab_size, weight.shape[1], generator=generator) * std
    source = weight.detach().float().cpu()
    sums = torch.zeros(tokens, weight.shape[1]).index_add_(0, rows, source[flat])
    known = lengths > 0
    table[:tokens][known] = sums[known] / lengths[known].unsqueeze(1)
    return table.to(weight.device, weight.dtype)


def _pieces(florence: Any, gemma: Any, tokens: int) -> list[list[int]]:
    """Florence-2's ids for each of Gemma's tokens; none where the row is random."""
    texts = [
        str(t).replace("\u2581", " ") for t in gemma.convert_ids_to_tokens(list(range(tokens)))
    ]
    pieces: list[list[int]] = florence(texts, add_special_tokens=False)["input_ids"]
    for index in gemma.all_special_ids:
        if index < tokens:
            pieces[index] = []
    for name in _SPECIAL:
        ours, theirs = getattr(gemma, name, None), getattr(florence, name, None)
        if ours is not None and theirs is not None:
            pieces[ours] = [theirs]
    return pieces
