"""generate() knows how long its rows may get, and that beams stay with their image."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from fastvlm.compat import hf
from fastvlm.decoding import cache as shared
from fastvlm.decoding import rows
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.loss.request import generating
from fastvlm.run.mixin import Mixin


class RoomForAll(Mixin):
    """A model whose generate() tells its self-attention cache the length that is asked for, and
    its decoder that nobody reads the rows of padding."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with generating(decoder_stack(self)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = hf.cache_in(model_kwargs)
        cache = getattr(cache, "self_attention_cache", cache)
        length = kwargs.get("max_cache_length", args[2] if len(args) > 2 else None)
        if isinstance(cache, Cache) and length is not None:
            rows.make_room(cache, length)
        return result

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        search: Any = super()._beam_search  # type: ignore[misc]
        with shared.in_groups(kwargs.get("past_key_values")):
            return search(*args, **kwargs)
