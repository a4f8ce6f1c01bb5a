"""RMSNorm in the classes of transformers and of those who copied them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm import ops
from fastvlm.compat import hf
from fastvlm.nn.linear import original
from fastvlm.nn.norm import RMSNorm
from fastvlm.nn.wrapped import owns
from fastvlm.patching.rules import Swap


class VarianceEpsilonRMSNorm(RMSNorm):
    """For the modules that call their eps so."""

    @property
    def eps(self) -> float:  # type: ignore[override]
        return float(self.__dict__["variance_epsilon"])


def is_rms_norm(module: Any) -> bool:
    named = hf.is_named(module, "RMSNorm")
    has_eps = owns(module, "eps") or owns(module, "variance_epsilon")
    return named and has_eps and isinstance(module._parameters.get("weight"), Tensor)


def choose_norm(module: Any) -> Swap | str:
    """(1 + w) or w: told apart by running it once, with numbers in place of its weight."""
    named_eps = hasattr(module, "eps")
    eps = module.eps if named_eps else module.variance_epsilon
    weight = torch.linspace(-0.5, 0.75, module.weight.numel())
    with torch.no_grad():
        x = torch.linspace(-1, 2, weight.numel()).unsqueeze(0)
        y = _with_weight(module, weight)(x).float()
        for offset in (1.0, 0.0):
            ours = ops.rms_norm(x, weight, eps=eps, offset=offset).float()
            if torch.allclose(y, ours, rtol=1e-2, atol=1e-3):
                mixin = RMSNorm if named_eps else VarianceEpsilonRMSNorm
                return Swap(mixin, ("rms_norm",), (("offset", offset),))
    return "it computes neither (1 + w) nor w times x / rms(x)"


def _with_weight(module: Any, weight: Tensor) -> Any:
    """What the class of module computes with another weight: no hook, no offloader is called."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module), _parameters={"weight": nn.Parameter(weight)})
    return functools.partial(type(module).forward, twin)


class T5RMSNorm(VarianceEpsilonRMSNorm):
    """T5's, which gives rows of its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        y: Tensor = original(type(self)).forward(self, x)
        return y


def choose_t5_norm(module: Any) -> Swap | str:
    swap = choose_norm(module)
    return swap if isinstance(swap, str) else replace(swap, mixin=T5RMSNorm)
