"""What transformers has of attention by name: which a config asks for, and what a name stands for.

As in `fastvlm.compat.hf`, a function is right for transformers 5.5 to 5.24 unless it says
otherwise, and nothing here imports transformers before it is called.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a config names: "eager", "sdpa", or another's."""
    name: str | None = config._attn_implementation
    return name


def attention_settings(config: Any) -> tuple[dict[str, Any], str] | None:
    """Where a config keeps its implementation of attention: a dict and the key in it; None if not.

    Written there, it is unchecked, and the configs inside this one keep theirs.
    """
    key = "_attn_implementation_internal"
    return (vars(config), key) if key in vars(config) else None


def config_with_attention(config: Any, name: str) -> Any:
    """A copy of a config that names another implementation of attention, unchecked."""
    config = copy.copy(config)
    config._attn_implementation_internal = name
    return config


def attention_function(name: str) -> Any:
    """The attention that is registered under a name; None where none is (5.0: eager)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name, None)


def registered_attention(name: str) -> dict[str, Any]:
    """What transformers has under a name: {"attention": function, "mask": function}, None each
    where there is none."""
    from transformers import AttentionInterface, AttentionMaskInterface

    return {
        "attention": AttentionInterface._global_mapping.get(name),
        "mask": AttentionMaskInterface._global_mapping.get(name),
    }


def register_attention(name: str, attention: Any, mask: Any) -> None:
    """Put an attention function and the maker of its masks under a name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def unregister_attention(name: str) -> None:
    """Take both away again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def mask_maker() -> Callable[..., Any] | None:
    """transformers.masking_utils.create_masks_for_generate; None on 4.48 to 4.52."""
    try:
        from transformers.masking_utils import create_masks_for_generate
    except ImportError:
        return None
    make: Callable[..., Any] = create_masks_for_generate
    return make


def whole_mask(*args: Any, **kwargs: Any) -> Any:
    """sdpa's mask, [B, 1, Q, K] and True where a key is seen; never left out for a causal one.

    Whoever slices rows off afterwards, or adds a mask, would not know what None stands for; it is
    left out only where all rows see all keys.
    """
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def sdpa_leaves_out_softcap() -> bool:
    """Whether transformers' sdpa takes a cap on the scores and leaves it out without a word.

    On versions where it does, Gemma-2 and T5Gemma choose sdpa by themselves; on others it raises.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    x = torch.zeros(1, 1, 1, 8)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    try:
        sdpa_attention_forward(module, x, x, x, None, softcap=1.0)
    except ValueError:
        return False
    return True


def _file_of_attention(cls: Any) -> Any:
    """The file of transformers, or of a hub's model, in which a class's attention is written."""
    files = (sys.modules.get(each.__module__) for each in cls.__mro__)
    return next((file for file in files if hasattr(file, "eager_attention_forward")), None)


def _eager_attention(cls: Any) -> Any:
    return getattr(_file_of_attention(cls), "eager_attention_forward", None)


def _has_sdpa(cls: Any) -> bool:
    from transformers import PreTrainedModel

    file = _file_of_attention(cls)
    models: list[Any] = [
        each
        for each in ([] if file is None else vars(file).values())
        if isinstance(each, type) and issubclass(each, PreTrainedModel)
        if each.__module__ == file.__name__
    ]
    return all(each._supports_sdpa for each in models)


_kept_eager_attention: Callable[[Any], Any] = functools.lru_cache(maxsize=256)(_eager_attention)
_kept_has_sdpa: Callable[[Any], bool] = functools.lru_cache(maxsize=256)(_has_sdpa)


def eager_attention(module: Any) -> Any:
    """The eager attention of the file that a module's class is written in; None without one."""
    if torch.compiler.is_compiling():  # torch.compile warns of whatever keeps results
        return _eager_attention(type(module))
    return _kept_eager_attention(type(module))


def has_sdpa(module: Any) -> bool:
    """Whether the models of a module's file say that transformers' sdpa is right for them."""
    if torch.compiler.is_compiling():
        return _has_sdpa(type(module))
    return _kept_has_sdpa(type(module))
