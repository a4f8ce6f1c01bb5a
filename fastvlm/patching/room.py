"""generate() knows how long its rows may get: their cache is allocated once."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from fastvlm.decoding import rows
from fastvlm.patching.rules import Host


class RoomForAll(Host):
    """A model whose generate() tells its self-attention cache the length that is asked for."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        given = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        result = prepare(*given, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        if isinstance(cache, Cache):
            rows.make_room(cache, max_cache_length)
        return result
