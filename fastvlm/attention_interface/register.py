"""``attn_implementation="fastvlm"``: made known to transformers, and taken back."""

from __future__ import annotations

from typing import Any

from fastvlm.compat import attentions, versions

NAME = "fastvlm"


def register_attention() -> None:
    """Make ``attn_implementation="fastvlm"`` known to transformers: attention without `patch`.

        fastvlm.register_attention()
        model = AutoModel.from_pretrained(path, attn_implementation="fastvlm")

    or ``model.set_attn_implementation("fastvlm")``. Any model whose attention goes through
    transformers' `AttentionInterface` takes it: encoders, decoders, vision towers. It computes what
    "sdpa" computes, under any mask, and the cap on scores of Gemma-2 and its kin besides. Padding
    and several texts in a row (`position_ids`, `cu_seq_lens_q` and `cu_seq_lens_k`) are left out of
    the work. What fastvlm's kernels do not have (position biases, sinks, windows without causality,
    float64, torch.compile, `output_attentions`) runs in transformers' own sdpa or eager attention.

    Only attention changes; `fastvlm.patch` does that and the rest, and goes on working on such a
    model. It holds for this process; calling it again changes nothing.

    Raises ImportError without transformers, RuntimeError where transformers is older than 5.5 or
    somebody else's function has the name.
    """
    if versions.installed("transformers") is None:
        raise ImportError(
            "fastvlm.register_attention() needs transformers: pip install 'fastvlm[hf]'"
        )
    if reason := versions.needs_newer_transformers("fastvlm.register_attention()"):
        raise RuntimeError(reason)
    wanted = _functions()
    for kind, found in attentions.registered_attention(NAME).items():
        if found is not None and found is not wanted[kind]:
            raise RuntimeError(
                f"fastvlm.register_attention(): transformers has another {kind} under the name "
                f"{NAME!r}, {getattr(found, '__module__', found)}"
            )
    attentions.register_attention(NAME, **wanted)


def unregister_attention() -> None:
    """Take back `register_attention`; nothing happens where it was not called.

    A model that still names "fastvlm" is refused by transformers (KeyError) until another
    ``set_attn_implementation`` or `register_attention`.
    """
    if versions.installed("transformers") is None or versions.attention_refused() is not None:
        return
    if attentions.registered_attention(NAME) == _functions():
        attentions.unregister_attention(NAME)


def _functions() -> dict[str, Any]:
    from fastvlm.attention_interface.attention import attention

    return {"attention": attention, "mask": attentions.whole_mask}
