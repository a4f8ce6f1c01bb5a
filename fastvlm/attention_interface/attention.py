"""The function that transformers calls for ``attn_implementation="fastvlm"``.

It computes what transformers' sdpa computes, and the cap on scores that sdpa does not have, with
fastvlm's ops where they can and with transformers' own sdpa or eager attention where they cannot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastvlm import ops
from fastvlm.attention_interface import library, masks
from fastvlm.attention_interface.call import Call
from fastvlm.attention_interface.masks import Keys, Reading
from fastvlm.compat import attentions
from fastvlm.layout import Layout
from fastvlm.ops._autograd import needs_grad

# what a model hands to a kernel of its own instead of a mask: without it a row sees too much
_INSTEAD_OF_A_MASK = ("indices", "block_indices")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, Q, D], key and value [B, Hkv, K, D], any float dtype and device
    -> ([B, Q, H, D] in query's dtype, None; with ``output_attentions=True`` the probabilities).

    attention_mask: [B or 1, 1, Q or 1, K], True where a key is seen, or added to the scores; None:
    causal where is_causal (default: the module's) says so. A row that a boolean mask lets see
    nothing gives zeros. dropout: of the probabilities. scaling: default D ** -0.5. softcap: scores
    become softcap * tanh(score / softcap). cu_seq_lens_q, cu_seq_lens_k: int [S + 1], where texts
    that lie side by side end; what they keep apart is not seen, whatever the mask says.

    Raises ValueError where a model hands over something that stands for a mask and that only a
    kernel of its own can read, and for cu_seq_lens that do not end where the rows end.
    """
    for name in _INSTEAD_OF_A_MASK:
        if more.get(name) is not None:
            raise ValueError(
                f"fastvlm: {type(module).__name__} hands {name!r} to its attention, which "
                "attn_implementation='fastvlm' cannot read: set 'sdpa' or 'eager'"
            )
    call = Call(module, query, key, value, attention_mask, dropout, scaling, is_causal, more)
    if not library.is_served(call):
        return library.attend(call)
    packed = call.packed()
    if query.shape[2] == 1 and packed is None and not dropout and not needs_grad(query, key, value):
        return _step(call)
    found = _reading(call, packed)
    return library.attend(call) if found is None else _rows(call, found)


def _step(call: Call) -> tuple[Tensor, Tensor | None]:
    """One query to each row: the cache is read where it lies."""
    batch, _, keys = call.sizes
    if call.mask is None:
        lengths, ancestry = masks.every_key(batch, keys, call.q.device), None
    else:
        where = masks.step(call.mask, batch, keys)
        if where is None:
            return library.attend(call)
        lengths, ancestry = where
    out = ops.cached_attention(
        call.q[:, :, 0],
        call.k.transpose(1, 2),
        call.v.transpose(1, 2),
        lengths,
        ancestry=ancestry,
        scale=call.scaling,
        softcap=call.softcap,
    )
    return out.unsqueeze(1), None


def _reading(call: Call, packed: Layout | None) -> Reading | None:
    """What mask and cu_seq_lens let see; None where no layout says it."""
    batch, queries, keys = call.sizes
    found: Reading | None
    if call.mask is not None:
        found = masks.read(call.mask, batch, queries, keys)
    elif not call.causal():
        found = masks.all_keys(batch, queries, keys, call.q.device)
    elif keys >= queries:  # as sdpa: the keys behind are the empty part of a static cache
        found = masks.all_causal(batch, queries, call.q.device)
    else:
        return None
    return found if packed is None or found is None else _narrowed(found, packed, call)


def _narrowed(found: Reading, packed: Layout, call: Call) -> Reading | None:
    """What both a mask and cu_seq_lens let see, where that is simple."""
    batch, _, keys = call.sizes
    if isinstance(found, Keys):
        alone = batch == 1 and found.kept is None
        return Keys(packed, None) if alone else None
    if found.kept is not None or found.keys != keys or not packed.reads_itself:
        return None
    if found.layout.kv_lengths == packed.kv_lengths:
        return found  # position_ids said the same
    return replace(found, layout=packed) if found.layout.num_segments == 1 else None


def _rows(call: Call, found: Reading) -> tuple[Tensor, Tensor | None]:
    """Training, prefill and whatever else has many rows."""
    batch, queries, _ = call.sizes
    if _prefers_sdpa(call, found):
        causal = not isinstance(found, Keys)
        return library.attend(replace(call, mask=None, is_causal=causal, more={}))
    keep: dict[str, Any] = {
        "scale": call.scaling,
        "softcap": call.softcap,
        "dropout_p": call.dropout,
    }
    if isinstance(found, Keys):
        k, v = _grid(call.k, found.kept), _grid(call.v, found.kept)
        out = ops.cross_attention(_grid(call.q), k, v, found.layout, **keep)
        return out.unflatten(0, (batch, queries)), None
    q, k, v = (_grid(x[:, :, : found.keys], found.kept) for x in (call.q, call.k, call.v))
    out = ops.self_attention(q, k, v, found.layout, causal=True, window=found.window, **keep)
    if found.kept is not None:
        whole = out.new_zeros(batch * queries, *out.shape[1:]).index_copy(0, found.kept, out)
        if found.rest is not None:
            others = _grid(call.q, found.rest.rows)
            out = ops.cross_attention(others, k, v, found.rest.layout, **keep)
            whole = whole.index_copy(0, found.rest.rows, out)
        out = whole
    return out.unflatten(0, (batch, queries)), None


def _prefers_sdpa(call: Call, found: Reading) -> bool:
    """On a GPU, where no row leaves anything out: there sdpa is a flash kernel."""
    if (
        call.q.device.type != "cuda"
        or call.softcap is not None
        or not attentions.has_sdpa(call.module)
    ):
        return False
    batch, queries, keys = call.sizes
    whole: Reading = masks.all_causal(batch, queries, call.q.device)
    if isinstance(found, Keys):
        whole = masks.all_keys(batch, queries, keys, call.q.device)
    return found is whole


def _grid(x: Tensor, kept: Tensor | None = None) -> Tensor:
    """[B, H, L, D] -> rows [B * L, H, D], or those of them that are kept."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if kept is None else rows.index_select(0, kept)
