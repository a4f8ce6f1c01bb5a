"""How far numbers may be apart: measured by how far transformers' own ways are."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlm.checking.result import DIFFERENT, LEFT_OUT, SAME, Verdict

# the package's rule: |ours - exact| <= 2 |transformers - exact| + tiny, of gradients 3. Two
# that keep it are apart by at most one more of |transformers - exact|, for which the spread stands
FORWARD, BACKWARD = 2.0, 3.0
# an attention that is further off than this many times another order of sums computes something
# else (a softcap that it does not know), and says nothing of rounding
_ANOTHER_FUNCTION = 30.0

Numbers = dict[str, Tensor]


@dataclass
class Yardstick:
    """The bound for one kind of numbers (logits, loss, gradients).

    base: what the others are compared with: transformers' own result, or the exact one. eps: of
    the dtype of the computation. factor: see FORWARD. spreads: of each other way, the largest
    difference from base for each name.
    """

    base: Numbers
    eps: float
    factor: float
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, way: str, numbers: Numbers) -> None:
        self.spreads[way] = distances(self.base, numbers)

    def dropped(self) -> list[str]:
        """Leaves out attentions that compute something else; their names."""
        sums = [s for way, s in self.spreads.items() if "attention" not in way]
        if not sums:
            return []
        found = []
        for way in [way for way in self.spreads if "attention" in way]:
            limits = {n: max(s.get(n, 0.0) for s in sums) for n in self.base}
            off = self.spreads[way]
            if any(
                not off.get(n, 0.0) <= _ANOTHER_FUNCTION * limits[n] + self._tiny(n) for n in limits
            ):
                del self.spreads[way]
                found.append(way)
        return found

    def allowed(self, name: str) -> float:
        spread = max((s.get(name, 0.0) for s in self.spreads.values()), default=0.0)
        return self.factor * max(spread, self._usual_share() * self._scale(name)) + self._tiny(name)

    def judge(self, what: str, ours: Numbers) -> Verdict:
        """One verdict for all names; detail names the worst of many."""
        missing = sorted(set(self.base) ^ set(ours))
        if missing:
            which = "transformers" if missing[0] in self.base else "fastvlm"
            detail = f"only {which} has one of {missing[0]}"
            return Verdict(what, DIFFERENT, detail=detail)
        mine = [name for name in self.base if bool(self.base[name].isfinite().all())]
        if not mine:
            return Verdict(what, LEFT_OUT, detail="transformers' own are not finite")
        off = distances({name: self.base[name] for name in mine}, ours)
        worst = max(mine, key=lambda name: _share(off[name], self.allowed(name)))
        bound = self.allowed(worst)
        verdict = SAME if off[worst] <= bound else DIFFERENT
        detail = f"at {worst}" if len(self.base) > 1 else ""
        if len(mine) < len(self.base):
            left = len(self.base) - len(mine)
            detail += f" ({left} of transformers' own are not finite and were not compared)"
        return Verdict(what, verdict, off[worst], bound, detail)

    def _tiny(self, name: str) -> float:
        """Two roundings of the largest value."""
        return 2 * self.eps * _largest(self.base[name])

    def _scale(self, name: str) -> float:
        """The largest value among what belongs to the same layer.

        The scale of a rounding is that of what is summed, not of what cancels: a bias of keys has
        no gradient at all but for rounding.
        """
        if len(self.base) == 1:
            return _largest(self.base[name])
        if not hasattr(self, "_scales"):
            self._scales: dict[str, float] = {}
            for other, value in self.base.items():
                layer = _layer(other)
                self._scales[layer] = max(self._scales.get(layer, 0.0), _largest(value))
        return self._scales[_layer(name)]

    def _usual_share(self) -> float:
        """The rounding that is usual: that of a single tensor may be small by luck."""
        if len(self.base) == 1:
            return 0.0
        if not hasattr(self, "_share"):
            shares = [
                max((s.get(n, 0.0) for s in self.spreads.values()), default=0.0) / self._scale(n)
                for n in self.base
                if 0 < self._scale(n) < float("inf")
            ]
            self._share = statistics.median(shares) if shares else 0.0
        return self._share


def distances(base: Numbers, numbers: Numbers) -> dict[str, float]:
    """max |numbers - base| of each name that both have; NaN and other shapes are infinitely far."""
    found = {}
    for name in base.keys() & numbers.keys():
        a, b = base[name], numbers[name]
        if a.shape != b.shape:
            found[name] = float("inf")
        elif a.numel() == 0:
            found[name] = 0.0
        else:
            off = (a.double() - b.to(a.device).double()).abs().max().item()
            found[name] = off if off == off else float("inf")
    return found


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _layer(name: str) -> str:
    """Of a parameter: its layer (the last number in its name), or the module that holds it."""
    found = re.match(r"(.*\.\d+)\.", name)
    return found.group(1) if found else name.rpartition(".")[0]


def _share(off: float, bound: float) -> float:
    return off / bound if bound > 0 else (float("inf") if off > 0 else 0.0)


def eps_of(dtypes: set[torch.dtype]) -> float:
    """The resolution of the coarsest of some dtypes."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)
