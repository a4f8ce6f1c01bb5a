"""Names of transformers that it does not promise.

Unless a function says otherwise it is right for transformers 5.5 to 5.24. Nothing here imports
transformers before it is called: fastvlm's ops stand without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# what fastvlm's mixins override of GenerationMixin and call again: name -> leading parameters
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_sample": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "_beam_search": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "_update_model_kwargs_for_generation": ("outputs",),
    "_prefill": ("input_ids", "generation_config"),
    "_expand_inputs_for_generation": ("expand_size", "is_encoder_decoder", "input_ids"),
    "_prepare_cache_for_generation": (
        "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ),
    "_prepare_attention_mask_for_generation": (
        "inputs_tensor", "generation_config", "model_kwargs",
    ),
}  # fmt: skip


def encode_method(config: Any) -> str | None:
    """The method in which generate() encodes the inputs of a model of this config. To 5.22 it has
    another name, and there is none for a model without an encoder."""
    from transformers import GenerationMixin

    if hasattr(GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation"):
        return "_maybe_prepare_encoder_kwargs_for_generation"
    return "_prepare_encoder_decoder_kwargs_for_generation" if config.is_encoder_decoder else None


_cache_argument: str | None = None  # no functools.cache: torch.compile would look behind it


def cache_argument() -> str:
    """The name of a cache among arguments and outputs: "past_key_values", from 5.24 on "cache"."""
    global _cache_argument
    if _cache_argument is None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
        _cache_argument = "cache" if "cache" in names else "past_key_values"
    return _cache_argument


def length_argument() -> str:
    """What modules of positions call the tokens before theirs."""
    return "cache_length" if cache_argument() == "cache" else "past_key_values_length"


def tells_positions_the_rows(stack: Any) -> bool:
    """Whether a stack calls its table of positions with its tokens; from 5.5 to 5.8 BART
    and mBART hand it Python's `input` instead, by an oversight, and positions of one row."""
    forwards = (cls.__dict__.get("forward") for cls in type(stack).__mro__)
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in forwards if f is not None)
    return not any(code is not None and "input" in code.co_names for code in codes)


def cached(cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument of a module, or as the field of an output."""
    return {cache_argument(): cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under whichever name; None where there is none."""
    found = kwargs.get(cache_argument())
    return kwargs.get("past_key_values") if found is None else found


def takes_cache(forward: Any) -> Any:
    """A forward with an argument past_key_values, which from transformers 5.24 on is called with
    ``cache=`` as well, and says so in its signature."""
    name = cache_argument()
    if name == "past_key_values":
        return forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            kwargs["past_key_values"] = kwargs.pop(name)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    renamed = [
        p.replace(name=name) if p.name == "past_key_values" else p
        for p in signature.parameters.values()
    ]
    call.__signature__ = signature.replace(parameters=renamed)  # type: ignore[attr-defined]
    return call


def cache_layer(name: str) -> Any:
    """A class of transformers.cache_utils for the cache of one layer, to derive from.

    `object` on transformers 4.48 to 4.53, which has none; there no stack is patched.
    """
    from transformers import cache_utils

    return getattr(cache_utils, name, object)


def layer_maker(cache: Any) -> Any:
    """What a cache calls for each layer that it gets while it is filled; None where it has none."""
    return getattr(cache, "layer_class_to_replicate", None)


def set_layer_maker(cache: Any, make: Callable[[], Any]) -> None:
    """Let a cache without layers call make() for each of them."""
    cache.layers = []
    cache.layer_class_to_replicate = make


def layers_of(cache: Any) -> Sequence[Any]:
    """What a cache holds for each layer; empty on transformers 4.48 to 4.53, which keep tensors."""
    layers: Sequence[Any] = getattr(cache, "layers", ())
    return layers


def is_offloaded(cache: Any) -> bool:
    """Whether a cache moves its layers away from the device between their uses."""
    return bool(cache.offloading)


def cross_is_filled(cache: Any, layer: int | None = None) -> bool:
    """Whether a layer's keys of the encoder (None: any layer's) are in an EncoderDecoderCache."""
    filled = cache.is_updated
    return any(filled.values()) if layer is None else bool(filled.get(layer))


def set_cross_filled(cache: Any, layer: int) -> None:
    """Note that a layer's keys of the encoder are there, so that nobody computes them again."""
    cache.is_updated[layer] = True


def commit_of(config: Any) -> str | None:
    """The commit of a hub's checkpoint that a config was loaded from; None for one of a folder."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def set_commit(config: Any, commit: str | None) -> None:
    """Write down the commit that a config was loaded from, where from_pretrained would."""
    if commit is not None:
        config._commit_hash = commit


def clip_image_processor() -> Any:
    """CLIP's image processor that scales with PIL, as transformers 4 does, not with torchvision.

    In older versions it is CLIPImageProcessor, later CLIPImageProcessorPil.
    """
    import transformers

    found = getattr(transformers, "CLIPImageProcessorPil", None)
    return transformers.CLIPImageProcessor if found is None else found


# whether a class of attention is told the position of a query as a number; older ones as a tensor.
# No functools.cache: torch.compile would look behind it
_TOLD_NUMBERS: dict[type, bool] = {}


def bias_of_distances(module: Any) -> torch.Tensor:
    """What a T5 attention with a table adds to its scores, float32 [H, 2D + 1], for the distances
    of a key from its query from -D to D, behind which it stays the same.
    """
    reach: int = module.relative_attention_max_distance
    device = module.relative_attention_bias.weight.device
    kind = type(module)
    if kind not in _TOLD_NUMBERS:
        told = inspect.signature(kind.compute_bias).parameters
        _TOLD_NUMBERS[kind] = "past_seen_tokens" in told
    if _TOLD_NUMBERS[kind]:
        place: dict[str, Any] = {"past_seen_tokens": reach}
    else:
        place = {"cache_position": torch.tensor([reach], device=device)}
    bias: torch.Tensor = module.compute_bias(1, 2 * reach + 1, device=device, **place)[0, :, 0]
    return (bias if bias.dtype == torch.float64 else bias.float()).contiguous()


LOOPS = ("_sample", "_beam_search")  # greedy decoding and sampling, beam search


def is_own_loop(loop: Any, name: str) -> bool:
    """Whether a bound method is GenerationMixin's own decoding loop of that name."""
    from transformers import GenerationMixin

    return loop.__func__ is getattr(GenerationMixin, name)


def takes_own_loop(generate: Any) -> bool:
    """Whether a bound generate() is GenerationMixin's own, and calls a callable custom_generate
    with the model, ids, processors, criteria, config and the model's keyword arguments."""
    from transformers import GenerationMixin

    own = getattr(generate, "__func__", None) is GenerationMixin.generate
    return own and "custom_generate" in inspect.signature(GenerationMixin.generate).parameters


def arguments_of_generate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of generate() by name."""
    from transformers import GenerationMixin

    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def syncs_gpus(model: Any) -> bool:
    """Whether generate() keeps processes in step by itself: FSDP, DeepSpeed's ZeRO-3."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    try:
        from transformers.distributed.fsdp import is_fsdp_managed_module
    except ImportError:  # to 5.1x its home
        from transformers.integrations.fsdp import is_fsdp_managed_module
    many = torch.distributed.get_world_size() > 1
    return many and bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def forward_of_steps(model: Any, config: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What a decoding loop calls for each step without beams: the model, or its compiled call
    where generate() compiles one (a static cache on a GPU)."""
    if config.num_beams == 1 and model._valid_auto_compile_criteria(dict(kwargs), config):
        compiled: Callable[..., Any] = model.get_compiled_call(config.compile_config)
        return compiled
    called: Callable[..., Any] = model.__call__
    return called


def optimized_for_decoding(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, a mixture of experts computes as it is fastest for a few tokens."""
    context: contextlib.AbstractContextManager[Any] = model._optimize_model_for_decode()
    return context


def generate_output(encodes: bool, beams: bool) -> Any:
    """The class of what generate() gives with return_dict_in_generate."""
    from transformers.generation import utils

    kind = ("Beam" if beams else "") + ("EncoderDecoder" if encodes else "DecoderOnly")
    return getattr(utils, f"Generate{kind}Output")


def is_named(module: Any, part: str) -> bool:
    """Whether part stands in the name of a module's class, or of one that it derives from."""
    return any(part in cls.__name__ for cls in type(module).__mro__)


def is_conv1d(cls: type) -> bool:
    """Whether a class is the linear layer of GPT-2, which keeps its weight as [inputs, outputs]."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, which attention fills by itself."""
    return type(cache).__name__ == "PagedAttentionCache"
