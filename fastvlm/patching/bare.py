"""Whether the steps of a model's decoding are its decoder's program and its head, and no more."""

from __future__ import annotations

from typing import Any

from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.nn.linear import original
from fastvlm.patching.foreign import replaced_in_class, replaced_method
from fastvlm.run.program import has_no_hooks

# what generate() calls of a model between two of its forwards
_BETWEEN_STEPS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_reorder_cache",
)


def bare_stack(model: Any) -> Any:
    """The decoder whose program may stand for a model, if nothing but it and the head runs in a
    step: no module around it has hooks, or is of a class that transformers has not, and nobody put
    a method of his own in the place of one that is called between two steps. None otherwise."""
    stack = decoder_stack(model)
    if stack is None or getattr(type(stack), "spec", None) is None:
        return None
    path = next((name for name, module in model.named_modules() if module is stack), None)
    if path is None or replaced_method(model, _BETWEEN_STEPS) is not None:
        return None
    parts = path.split(".")
    for length in range(len(parts)):
        module = model.get_submodule(".".join(parts[:length]))
        cls = original(type(module))
        home = cls.__module__.split(".")[0]
        if home not in ("transformers", "fastvlm") or not has_no_hooks(module):
            return None
        if replaced_in_class(cls) is not None:
            return None
    return stack
