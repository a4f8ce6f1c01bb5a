"""The vision tower of a model that takes kept features in place of pixels, and what it checks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvlm.checks import fail
from fastvlm.compat import pytorch
from fastvlm.features.identity import OP, tensors_of, weight_of
from fastvlm.nn.weight_mark import WeightMark
from fastvlm.patching.classes import become, swapped, unpatched_class
from fastvlm.patching.rules import Swap
from fastvlm.run.mixin import Mixin

if TYPE_CHECKING:
    from fastvlm.features.kept import VisionFeatures

TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"
PARTS = {"tower": (TOWER,), "projector": (TOWER, PROJECTOR)}
_ATTRIBUTE = "_fastvlm_features"
# arguments of towers that ask for something else than their last hidden state as it is kept, and
# the values with which they do not
_CHANGE_THE_OUTPUT = {
    "output_hidden_states": (None, False),
    "output_attentions": (None, False),
    "interpolate_pos_encoding": (None, False),
    "return_dict": (None, True),
}


def owner_of(model: nn.Module) -> Any:
    """The module that has a vision tower and a projector. ValueError: none, or several."""
    found = [m for m in model.modules() if {TOWER, PROJECTOR} <= set(m._modules)]
    if len(found) != 1:
        wanted = f"a Florence-2, Florenz or PaliGemma model: one {TOWER} beside a {PROJECTOR}"
        given = f"{type(model).__name__} with {len(found)}"
        raise ValueError(f"fastvlm.{OP}: model must be {wanted}; got {given}")
    return found[0]


class TakesFeatures(Mixin):
    """A vision tower whose images may have been seen before."""

    keeps_signature = True
    instance_attributes = (_ATTRIBUTE,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, Mapping):
            return super().forward(*args, **kwargs)
        if len(args) > 1:
            wanted = "given by name beside kept features"
            raise fail(OP, "what follows pixel_values", wanted, f"{len(args) - 1} by position")
        return self._kept(given, kwargs)

    @torch.compiler.disable
    def _kept(self, given: Mapping[str, Any], kwargs: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if getattr(self, "_is_replica", False):
            raise fail(OP, "model", "no nn.DataParallel (DDP: torchrun)", type(self).__name__)
        for name, unchanged in _CHANGE_THE_OUTPUT.items():
            if name in kwargs and kwargs[name] not in unchanged:
                raise fail(OP, name, "left out: only the tower's output is kept", kwargs[name])
        features, projected = vars(self)[_ATTRIBUTE].of_batch(given)
        if projected:
            features._fastvlm_projected = True
        return BaseModelOutputWithPooling(last_hidden_state=features)


class TakesProjected(Mixin):
    """The projector behind it, which has nothing to do where its own output was kept."""

    keeps_signature = True
    instance_attributes = (_ATTRIBUTE,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if getattr(given, "_fastvlm_projected", False):
            return given
        return super().forward(*args, **kwargs)


_SWAPS = {
    TOWER: Swap(TakesFeatures, ("kept features",)),
    PROJECTOR: Swap(TakesProjected, ("kept features",)),
}


def attach(owner: Any, features: VisionFeatures) -> None:
    for name, swap in _SWAPS.items():
        module = owner._modules[name]
        become(module, swapped(unpatched_class(module), swap))
        setattr(module, _ATTRIBUTE, features)


def detach(owner: Any) -> None:
    for name in _SWAPS:
        module = owner._modules[name]
        if isinstance(module, (TakesFeatures, TakesProjected)):
            become(module, unpatched_class(module))


def arithmetic(weight: Tensor) -> torch.dtype:
    """In which the tower's products are computed here and now."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class Frozen:
    """The parts whose output is kept, as the features were kept of them: watched for changes."""

    def __init__(self, owner: Any, part: str) -> None:
        self._parts = [(name, weakref.ref(owner._modules[name])) for name in PARTS[part]]
        self._told = False
        self.note()

    def modules(self) -> dict[str, nn.Module]:
        found = {}
        for name, ref in self._parts:
            module = ref()
            assert module is not None
            found[name] = module
        return found

    def note(self) -> None:
        """From here on these are the weights that the features are of."""
        self._noted = {name: _Note(tensor) for name, tensor in tensors_of(self.modules())}

    def changed(self, weights: Mapping[str, str]) -> dict[str, str]:
        """The weights as they are now, hashed again where they may have been written to.

        weights: as they were noted. Waits for no device unless something has changed.
        """
        found = {}
        for name, tensor in tensors_of(self.modules()):
            note = self._noted.get(name)
            if note is None or not note.is_current(tensor):
                found[name] = weight_of(name, tensor)
                if found[name] == weights.get(name):
                    self._noted[name] = _Note(tensor)
            elif name in weights:
                found[name] = weights[name]
        return found

    def check(self) -> None:
        """ValueError: a part trains. A warning, once: it draws at random, which is left out."""
        if torch.is_grad_enabled():
            for name, tensor in tensors_of(self.modules()):
                if tensor.requires_grad:
                    wanted = (
                        f"frozen ({name}.requires_grad is True): what is kept never changes; "
                        f"{name.split('.')[0]}.requires_grad_(False), or no features kept"
                    )
                    raise ValueError(
                        f"fastvlm.{OP}: the part of the model whose output is kept must be {wanted}"
                    )
        if self._told:
            return
        for prefix, module in self.modules().items():
            for name, inner in module.named_modules(prefix=prefix):
                if inner.training and _draws(inner):
                    self._told = True
                    warnings.warn(
                        f"fastvlm.{OP}: {name} ({inner}) is in training mode and draws at random; "
                        "features are kept, and read, as in evaluation, without that",
                        stacklevel=2,
                    )
                    return


class _Note:
    """What shows whether a weight is the tensor it was, with the values it had."""

    def __init__(self, weight: Tensor) -> None:
        self._state = _state(weight)
        # it compares elements, for which a GPU would be waited for
        self._mark = WeightMark(weight) if weight.device.type == "cpu" else None

    def is_current(self, weight: Tensor) -> bool:
        if _state(weight) != self._state:
            return False
        return self._mark is None or self._mark.is_current(weight)


def _state(weight: Tensor) -> tuple[Any, ...]:
    where = weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else None
    return id(weight), pytorch.version_of(weight), weight.dtype, weight.device, where


def _draws(module: nn.Module) -> bool:
    if pytorch.drops(module):
        return bool(module.p)
    rates = [getattr(module, name, 0) for name in ("drop_prob", "dropout", "attention_dropout")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
