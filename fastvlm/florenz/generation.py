"""What generate() must know of a Florenz model: it encodes images and prompts once, up front."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from fastvlm.checks import fail
from fastvlm.compat import hf
from fastvlm.florenz.config import FlorenzConfig
from fastvlm.florenz.readers import OP

_IMAGES = ("pixel_values", "image_of_prompt")


class FlorenzGeneration(GenerationMixin):
    """generate(input_ids, pixel_values, attention_mask, image_of_prompt, ...) with a KV cache."""

    config: FlorenzConfig
    model: Any

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> dict[str, Any]:
        if (index := model_kwargs.get("prompt_of_target")) is not None:
            wanted = "None in generate(), which writes one target for each row of input_ids"
            raise fail(OP, "prompt_of_target", wanted, index)
        if model_kwargs.get("encoder_outputs") is not None:
            return model_kwargs
        # the images stay, for an assistant_model to encode them as well
        inputs = {name: model_kwargs.get(name) for name in _IMAGES}
        inputs["inputs_embeds"] = model_kwargs.pop("inputs_embeds", None)
        inputs[model_input_name or "input_ids"] = inputs_tensor
        model_kwargs["encoder_outputs"], _ = self.model.encode(
            **inputs,
            attention_mask=model_kwargs.get("attention_mask"),
            output_attentions=generation_config.output_attentions,
            output_hidden_states=generation_config.output_hidden_states,
        )
        return model_kwargs

    # its name to transformers 5.22
    _prepare_encoder_decoder_kwargs_for_generation = _maybe_prepare_encoder_kwargs_for_generation

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        if expand_size > 1:  # nobody asks for the images of beams, which are encoded by now
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in _IMAGES}
        expanded: Any = super()._expand_inputs_for_generation(expand_size, *args, **model_kwargs)
        return expanded

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        # as forward() does; some versions would look for the pad id of the targets (0), which
        # begins every prompt
        return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = hf.cache_in(model_kwargs)
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = hf.cache_in(model_kwargs)
        if given is None and isinstance(cache, EncoderDecoderCache):
            cross = cache.cross_attention_cache
            # Gemma's sliding window is of the targets, not of what they read
            if type(cross) is DynamicCache and not hf.is_offloaded(cross):
                model_kwargs[hf.cache_argument()] = EncoderDecoderCache(
                    cache.self_attention_cache, DynamicCache()
                )
            elif type(cross) is StaticCache:
                text = copy.deepcopy(self.config.get_text_config(decoder=True))
                if getattr(text, "layer_types", None) is not None:
                    text.layer_types = ["full_attention"] * len(text.layer_types)
                length = model_kwargs["encoder_outputs"][0].shape[1]
                model_kwargs[hf.cache_argument()] = EncoderDecoderCache(
                    cache.self_attention_cache,
                    StaticCache(text, max_cache_len=length, offloading=hf.is_offloaded(cross)),
                )
        return result
