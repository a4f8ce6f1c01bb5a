"""Silent faults planted into a patched model: other numbers, and no error.

A fault is given a pytest.MonkeyPatch and the patched model. Those of the ops are planted where the
patched modules find them, others in one module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.layout import Layout

Fault = Callable[[pytest.MonkeyPatch, nn.Module], None]


def planted(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Another forward for a patched module, which an unpatched side does not have.

    forward: called with the module's own forward and its arguments.
    """
    base: Any = type(module)
    own = getattr(base, "_fastvlm_base", base)
    body = {
        "forward": lambda self, *args, **kwargs: forward(
            lambda *a, **k: base.forward(self, *a, **k), *args, **kwargs
        ),
        "_fastvlm_base": own,
        "__module__": base.__module__,
    }
    cls = type(base)(base.__name__, (base,), body)
    cls._fastvlm_class = cls
    module.__class__ = cls


def _wrong(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[..., Any]) -> None:
    real = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: change(real, *args, **kwargs))


def padding_is_read(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    real = Layout.from_padded.__func__  # type: ignore[attr-defined]

    def all_visible(cls: Any, mask: Tensor, kv_mask: Tensor | None = None, *rest: Any) -> Layout:
        kv_mask = None if kv_mask is None else torch.ones_like(kv_mask)
        return real(cls, torch.ones_like(mask), kv_mask, *rest)

    monkeypatch.setattr(Layout, "from_padded", classmethod(all_visible))


def scale_is_off(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "scale": kwargs["scale"] * 1.01})

    _wrong(monkeypatch, "self_attention", change)


def future_is_seen(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "causal": False})

    _wrong(monkeypatch, "self_attention", change)


def softcap_is_dropped(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "softcap": None})

    _wrong(monkeypatch, "self_attention", change)


def window_is_off_by_one(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, *args: Any, **kwargs: Any) -> Any:
        window = kwargs.get("window")
        return real(*args, **{**kwargs, "window": None if window is None else window - 1})

    _wrong(monkeypatch, "self_attention", change)


def another_row_of_the_encoder(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(q, k.roll(1, 0), v.roll(1, 0), *args, **kwargs)

    _wrong(monkeypatch, "cross_attention", change)


def labels_are_shifted_once_more(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, h: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return real(h, weight, labels.roll(1), **kwargs)

    _wrong(monkeypatch, "linear_cross_entropy", change)


def head_is_of_yesterday(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    head = model.get_output_embeddings()
    stale = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.add_(0.05 * torch.randn(head.weight.shape))

    def change(real: Any, h: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return real(h, stale + 0 * weight, labels, **kwargs)

    _wrong(monkeypatch, "linear_cross_entropy", change)


def projection_is_of_yesterday(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    module: Any = next(m for n, m in model.named_modules() if n.endswith("self_attn.v_proj"))
    stale = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(0.02 * torch.randn(module.weight.shape))
    planted(module, lambda forward, x: nn.functional.linear(x, stale, module.bias))


def mlp_has_no_gradient(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    def change(real: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(x.detach(), *args, **kwargs)

    _wrong(monkeypatch, "gelu_mlp", change)
    _wrong(monkeypatch, "geglu_mlp", change)


def steps_are_off(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    from fastvlm.decoding.prefixes import decoder_stack

    def forward(own: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        filled = past.get_seq_length() if past is not None else 0
        out = own(*args, **kwargs)
        if filled:
            out.last_hidden_state = out.last_hidden_state * 1.001
        return out

    stack = decoder_stack(model)
    assert stack is not None
    planted(stack, forward)


def beams_are_not_reordered(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    from transformers.cache_utils import DynamicLayer

    from fastvlm.decoding import rows

    monkeypatch.setattr(rows.RowLayer, "reorder_cache", lambda self, index: None)
    monkeypatch.setattr(rows.Rows, "reorder", lambda self, index: None)
    assert issubclass(rows.RowLayer, DynamicLayer)
