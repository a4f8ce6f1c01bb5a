"""A call of attention as transformers makes it, and where its packed texts end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvlm.attention_interface import masks
from fastvlm.layout import Layout


@dataclass(frozen=True)
class Call:
    """q [B, H, Q, D], k, v [B, Hkv, K, D]; mask [B or 1, 1 or H, Q or 1, K], True where a key is
    seen, or added to the scores."""

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    more: dict[str, Any]  # softcap and all else, by name

    @property
    def softcap(self) -> float | None:
        cap: float | None = self.more.get("softcap")
        return cap

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        return self.q.shape[0], self.q.shape[2], self.k.shape[2]

    def causal(self) -> bool:
        """Whether sdpa makes up for the mask that is not there."""
        asked = self.is_causal
        if asked is None:
            asked = getattr(self.module, "is_causal", True)
        return self.mask is None and self.q.shape[2] > 1 and bool(asked)

    def _ends(self) -> tuple[Tensor, Tensor] | None:
        ends = self.more.get("cu_seq_lens_q"), self.more.get("cu_seq_lens_k")
        return None if ends[0] is None or ends[1] is None else ends  # type: ignore[return-value]

    def packed(self) -> Layout | None:
        """The layout that cu_seq_lens describe, None without. ValueError: they end elsewhere than
        the rows."""
        ends = self._ends()
        if ends is None:
            return None
        layout = masks.packed(*ends, self.q.device)
        batch, queries, keys = self.sizes
        for name, has, wants in (
            ("cu_seq_lens_q", layout.num_tokens, batch * queries),
            ("cu_seq_lens_k", layout.num_kv_tokens, batch * keys),
        ):
            if has != wants:
                raise ValueError(
                    f"fastvlm: {name} must end at {wants}, where its rows end; got {has}"
                )
        return layout

    def with_packing_in_mask(self) -> Call:
        """The same with cu_seq_lens as a mask: transformers' sdpa and eager do not read them."""
        ends = self._ends()
        if ends is None:
            return self
        device, (batch, queries, keys) = self.q.device, self.sizes
        of_rows, of_keys = (
            torch.searchsorted(
                each[1:].to(device, torch.int64).contiguous(),
                torch.arange(batch * length, device=device),
                right=True,
            ).view(batch, length)
            for each, length in zip(ends, (queries, keys))
        )
        seen = (of_rows.unsqueeze(2) == of_keys.unsqueeze(1)).unsqueeze(1)
        if self.mask is None:
            return replace(self, mask=seen & lower(self) if self.causal() else seen)
        if self.mask.dtype == torch.bool:
            return replace(self, mask=seen & self.mask)
        return replace(self, mask=self.mask.masked_fill(~seen, torch.finfo(self.mask.dtype).min))


def lower(call: Call) -> Tensor:
    """[1, 1, Q, K], True up to a row's own position."""
    _, queries, keys = call.sizes
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.q.device)
    return seen.tril()
