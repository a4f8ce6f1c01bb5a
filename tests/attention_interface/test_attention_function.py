"""The function behind attn_implementation="fastvlm": any mask gives what sdpa gives, and who
computed it is who should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from error_rule import BACKWARD, FORWARD, check
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask, sliding_window_causal_mask_function
from transformers.models.gemma2 import modeling_gemma2

from fastvlm.attention_interface import library
from fastvlm.attention_interface.attention import attention
from fastvlm.compat import attentions

B, H, HKV, L, S, D = 3, 4, 2, 9, 13, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PADS = {
    "right": [9, 4, 6],
    "left": [9, 4, 6],
    "none": [9, 9, 9],
}


class Module(nn.Module):
    """What attention functions ask a module for."""

    is_causal = True
    num_key_value_groups = H // HKV


def _padding(kind: str, length: int = L, hole: bool = False) -> Tensor:
    mask = torch.zeros(B, length, dtype=torch.bool)
    for row, n in enumerate(PADS[kind]):
        n += length - L
        if kind == "left":
            mask[row, length - n :] = True
        else:
            mask[row, :n] = True
    return mask


def _causal(q: int = L, k: int = L) -> Tensor:
    return torch.ones(q, k, dtype=torch.bool).tril(k - q)


def _packed(window: int | None = None) -> Tensor:
    """Texts side by side, other lengths in each row."""
    masks = []
    for lengths in ([4, 5], [9], [1, 6, 2]):
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        masks.append(ids[:, None] == ids[None])
    seen = torch.stack(masks) & _causal()
    if window is not None:
        at = torch.arange(L)
        seen &= at[None] > at[:, None] - window
    return seen[:, None]


def _both_sides() -> Tensor:
    pad = torch.zeros(B, L, dtype=torch.bool)
    pad[0, 2:7], pad[1, 0:9], pad[2, 3:9] = True, True, True
    return (pad[:, None] & _causal())[:, None]


def _holes(own: bool = True) -> Tensor:
    """Padding within a text; the rows of it see nothing (own) or what came before."""
    pad = torch.ones(B, L, dtype=torch.bool)
    pad[0, 3], pad[2, 5:7] = False, False
    seen = pad[:, None] & _causal()
    return (seen & pad[:, :, None] if own else seen)[:, None]


def _window(pad: str, window: int = 4) -> Tensor:
    function = sliding_window_causal_mask_function(window)
    mask = sdpa_mask(
        B, L, L, mask_function=function, attention_mask=_padding(pad), allow_is_causal_skip=False
    )
    assert mask is not None
    return mask


def _none_hidden(mask: Tensor) -> Tensor:
    """Added to scores; no row may be hidden whole."""
    assert mask.any(-1).all()
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Case:
    """q rows, k rows, the mask, whether the module is causal, who computes."""

    mask: Callable[[], Tensor | None]
    by: str
    queries: int = L
    keys: int = L
    causal: bool = True


CASES = {
    "no mask, causal": Case(lambda: None, "ops"),
    "no mask": Case(lambda: None, "ops", causal=False),
    "no mask, cross": Case(lambda: None, "ops", keys=S, causal=False),
    "causal": Case(lambda: _causal()[None, None], "ops"),
    "causal for all": Case(lambda: _causal()[None, None].expand(B, 1, L, L), "ops"),
    "right padding": Case(lambda: _padding("right")[:, None, None] & _causal(), "ops"),
    "left padding": Case(lambda: _padding("left")[:, None, None] & _causal(), "ops"),
    "both sides": Case(_both_sides, "ops"),
    "holes": Case(_holes, "ops"),
    "holes whose rows see": Case(lambda: _holes(own=False), "library"),
    "texts side by side": Case(_packed, "ops"),
    "texts side by side, window": Case(lambda: _packed(3), "ops"),
    "window": Case(lambda: _window("none"), "ops"),
    "window, left padding": Case(lambda: _window("left"), "ops"),
    "window, right padding": Case(lambda: _window("right"), "library"),
    "window of one": Case(lambda: torch.eye(L, dtype=torch.bool)[None, None], "ops"),
    "padded keys": Case(
        lambda: _padding("right", S)[:, None, None].expand(B, 1, L, S), "ops", keys=S
    ),
    "padded keys, one row": Case(lambda: _padding("left", S)[:, None, None], "ops", keys=S),
    "padded keys and rows": Case(
        lambda: _padding("right")[:, None, None] & _padding("right")[:, None, :, None],
        "library",
        causal=False,
    ),
    "nothing seen": Case(
        lambda: (torch.arange(B) > 0)[:, None, None, None].expand(B, 1, L, L), "ops"
    ),
    "empty static cache": Case(
        lambda: torch.nn.functional.pad(_causal(), (0, S - L))[None, None], "ops", keys=S
    ),
    "no mask, empty static cache": Case(lambda: None, "ops", keys=S),
    "more text on a cache": Case(lambda: _causal(L, S)[None, None], "library", keys=S),
    "prefix": Case(lambda: (_causal() | (torch.arange(L) < 3))[None, None], "library"),
    "window both ways": Case(
        lambda: ((torch.arange(L)[:, None] - torch.arange(L)).abs() < 3)[None, None], "library"
    ),
    "a mask per head": Case(
        lambda: _causal()[None, None] & (torch.arange(H)[:, None, None] > 0) | torch.eye(L).bool(),
        "library",
    ),
    "added": Case(lambda: _none_hidden(_causal()[None, None]), "ops"),
    "added, padding": Case(
        lambda: _none_hidden(_padding("right")[:, None, None] & _causal()), "ops"
    ),
    "added, infinite": Case(
        lambda: torch.where(_causal(), 0.0, float("-inf"))[None, None], "ops"
    ),
    "added, mild": Case(lambda: torch.where(_causal(), 0.0, -2.0)[None, None], "library"),
    "added, all hidden": Case(
        lambda: torch.full((B, 1, L, L), torch.finfo(torch.float32).min), "library"
    ),
    "a step": Case(lambda: None, "ops", queries=1, keys=S),
    "a step, padding": Case(lambda: _padding("left", S)[:, None, None], "ops", 1, S),
    "a step, added": Case(
        lambda: _none_hidden(_padding("right", S)[:, None, None]), "ops", 1, S
    ),
    "a step, mild": Case(lambda: torch.where(_padding("right", S), 0.0, -2.0)[:, None, None],
                         "library", 1, S),
}  # fmt: skip


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who computed, call by call."""
    found: list[str] = []
    attend = library.attend

    def noted(call: Any) -> Any:
        found.append("library")
        return attend(call)

    monkeypatch.setattr(library, "attend", noted)
    return found


def _inputs(queries: int, keys: int, heads: int = HKV, seed: int = 0) -> list[Tensor]:
    """As projections give them: [B, L, H, D] seen as [B, H, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, H), (keys, heads), (keys, heads))
    return [2 * torch.randn(B, n, h, D, generator=generator).transpose(1, 2) for n, h in sizes]


def _run(
    function: Any, module: Any, inputs: list[Tensor], mask: Any, grads: bool, **settings: Any
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(grads) for x in inputs]
    out = function(module, *leaves, mask, **settings)[0]
    if not grads:
        return [out]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *[x.grad for x in leaves if x.grad is not None]]


def _compare(
    module: Any, case: Case, dtype: torch.dtype, grads: bool, library_: Any, **settings: Any
) -> None:
    mask = case.mask()
    inputs = [x.to(dtype) for x in _inputs(case.queries, case.keys)]

    def of(kind: torch.dtype) -> Any:
        if mask is None or mask.dtype == torch.bool:
            return mask
        return mask.double().clamp(min=torch.finfo(kind).min).to(kind)

    run = lambda f, kind: _run(  # noqa: E731
        f, module, [x.to(kind) for x in inputs], of(kind), grads, **settings
    )
    ours, theirs, exact = run(attention, dtype), run(library_, dtype), run(library_, torch.float64)
    assert len(ours) == len(exact) == (4 if grads else 1)
    for name, *each, factor in zip(
        ("out", "dq", "dk", "dv"), ours, theirs, exact, (FORWARD, *[BACKWARD] * 3)
    ):
        check(name, *each, factor)


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.turns(3))])
@pytest.mark.parametrize("name", CASES)
def test_every_mask_gives_what_sdpa_gives(
    name: str, dtype: str, grads: bool, by: list[str]
) -> None:
    case, module = CASES[name], Module()
    module.is_causal = case.causal  # type: ignore[misc]
    _compare(module, case, DTYPES[dtype], grads, sdpa_attention_forward, scaling=0.3)
    assert by == (["library"] if case.by == "library" else [])


def _gemma() -> Any:
    """A module whose file has a cap on scores, and no sdpa."""
    config = tf.Gemma2Config(
        hidden_size=H * D, num_attention_heads=H, num_key_value_heads=HKV, head_dim=D
    )
    return modeling_gemma2.Gemma2Attention(config, 0).eval()


# eager attention gives rows that see nothing the mean of all values: such rows are left out here
CAPPED = ("causal", "right padding", "texts side by side, window", "window", "padded keys",
          "prefix", "a step", "a step, padding", "added")  # fmt: skip


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CAPPED)
def test_a_cap_on_scores_is_eagers(name: str, grads: bool, by: list[str]) -> None:
    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any) -> Any:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min).to(q.dtype)
        return modeling_gemma2.eager_attention_forward(module, q, k, v, mask, **settings)

    case = CASES[name]
    _compare(_gemma(), case, torch.float32, grads, eager, softcap=1.5, scaling=0.7)
    assert by == (["library"] if case.by == "library" else [])


def test_rows_that_see_nothing_are_zeros_with_a_cap_too() -> None:
    """In float64, which no kernel has, as in float32."""
    mask = _padding("left")[:, None, None] & _causal()
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.to(dtype) for x in _inputs(L, L))
        out = attention(_gemma(), q, k, v, mask, softcap=1.5)[0]
        assert torch.equal(out[1, :5], torch.zeros_like(out[1, :5]))
        assert (out[1, 5:] != 0).all()


def test_masks_that_transformers_makes_are_read(by: list[str]) -> None:
    """whole_mask is what is registered; eager's is the one of old models' own code."""
    for make in (attentions.whole_mask, eager_mask):
        mask = make(batch_size=B, q_length=L, kv_length=L, attention_mask=_padding("right"))
        assert mask.shape == (B, 1, L, L)
        q, k, v = _inputs(L, L)
        got = attention(Module(), q, k, v, mask)[0]
        want = sdpa_attention_forward(Module(), q, k, v, mask)[0]
        torch.testing.assert_close(got, want)
    assert by == []
    whole = attentions.whole_mask(batch_size=B, q_length=L, kv_length=L, allow_is_causal_skip=True)
    assert whole is not None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_written_to_is_looked_at_again(inference: bool, grad: bool) -> None:
    with torch.inference_mode(inference):
        mask = _causal()[None, None].clone()
        q, k, v = _inputs(L, L)
        q.requires_grad_(grad and not inference)
        first = attention(Module(), q, k, v, mask)[0]
        mask[..., 2:, 0] = False
        got = attention(Module(), q, k, v, mask)[0]
        want = sdpa_attention_forward(Module(), q, k, v, mask)[0]
    assert not torch.allclose(first, got)
    torch.testing.assert_close(got, want)


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm.attention_interface import masks

    looks: list[int] = []
    read = masks._read
    monkeypatch.setattr(masks, "_read", lambda *a: (looks.append(1), read(*a))[1])
    mask = _packed()
    for seed in range(3):
        attention(Module(), *_inputs(L, L, seed=seed), mask)
    assert len(looks) == 1
    attention(Module(), *_inputs(L, L), mask.clone())
    assert len(looks) == 2


def _ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", ["not at all", "causal", "the same", "more", "padding"])
def test_texts_side_by_side_by_their_ends(masked: str, dtype: torch.dtype, by: list[str]) -> None:
    q, k, v = (x[:1].to(dtype) for x in _inputs(L, L))
    ends = _ends(4, 3, 2)
    ids = torch.repeat_interleave(torch.arange(3), ends.diff())
    apart = (ids[:, None] == ids)[None, None]
    mask = {
        "not at all": None,
        "causal": _causal()[None, None],
        "the same": apart & _causal(),
        "more": _packed()[:1],
        "padding": _padding("right")[1:2, None, None] & _causal(),
    }[masked]
    seen = apart & (_causal() if mask is None else mask)
    got = attention(Module(), q, k, v, mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends.clone())[0]
    want = sdpa_attention_forward(Module(), q, k, v, seen)[0]
    torch.testing.assert_close(got, want)
    fast = dtype == torch.float32 and masked not in ("more", "padding")
    assert by == ([] if fast else ["library"])


def test_texts_side_by_side_read_others(by: list[str]) -> None:
    """Cross-attention: each text reads keys of its own."""
    q, k, v = (x[:1] for x in _inputs(L, S))
    module = Module()
    module.is_causal = False  # type: ignore[misc]
    ends = {"cu_seq_lens_q": _ends(4, 5), "cu_seq_lens_k": _ends(10, 3)}
    got = attention(module, q, k, v, None, **ends)[0]
    for rows, keys in ((slice(0, 4), slice(0, 10)), (slice(4, 9), slice(10, 13))):
        want = sdpa_attention_forward(module, q[:, :, rows], k[:, :, keys], v[:, :, keys], None)[0]
        torch.testing.assert_close(got[:, rows], want)
    assert by == []
    with pytest.raises(ValueError, match="cu_seq_lens_k must end at 13, where its rows end; got 9"):
        attention(module, q, k, v, None, cu_seq_lens_q=_ends(4, 5), cu_seq_lens_k=_ends(4, 5))


def test_ends_that_were_written_to_are_read_again() -> None:
    q, k, v = (x[:1] for x in _inputs(L, L))
    ends = _ends(4, 5)
    first = attention(Module(), q, k, v, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)[0]
    ends[1] = 6
    got = attention(Module(), q, k, v, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)[0]
    fresh = attention(
        Module(), q, k, v, None, cu_seq_lens_q=_ends(6, 3), cu_seq_lens_k=_ends(6, 3)
    )[0]
    assert torch.equal(got, fresh)
    assert not torch.allclose(got, first)


def test_dropout_keeps_as_much_as_it_says(by: list[str]) -> None:
    q, k, v = (x[:, :, :1].expand(-1, -1, 400, -1).contiguous() for x in _inputs(1, 1))
    v = torch.ones_like(v)
    module = Module().train()
    torch.manual_seed(3)
    out = attention(module, q, k, v, None, dropout=0.25)[0]
    assert abs(out.mean() - 1) < 0.02
    assert out.std() > 0.01
    torch.manual_seed(3)
    assert torch.equal(out, attention(module, q, k, v, None, dropout=0.25)[0])
    assert by == []


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_what_stands_for_a_mask_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Module hands '{name}' to its attention"):
        attention(Module(), *_inputs(L, L), None, **{name: torch.zeros(1)})


def test_others_go_to_the_library(by: list[str]) -> None:
    """What no op has: tensors of other kinds, sinks, values of another width, one image for all."""
    q, k, v = _inputs(L, S)
    module = Module()
    module.is_causal = False  # type: ignore[misc]
    got = attention(module, q, k, torch.cat((v, v), -1), None)[0]
    assert got.shape[-1] == 2 * D
    torch.func.vmap(lambda x: attention(module, x, k, v, None)[0])(q.unsqueeze(0))
    bias = torch.randn(1, H, L, S)
    got = attention(module, q, k, v, None, position_bias=bias)[0]
    torch.testing.assert_close(got, sdpa_attention_forward(module, q, k, v, bias)[0])
    paged = type("PagedAttentionCache", (), {})()  # which sdpa fills
    attention(module, q, k, v, None, cache=paged)
    assert by == ["library"] * 4


def test_a_cap_where_nobody_has_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"softcap: 2\.0"):
        attention(Module(), *(x.double() for x in _inputs(L, L)), None, softcap=2.0)
