"""Each name of another library that fastvlm.compat stands for, on the versions installed here."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker
from transformers import GenerationMixin, cache_utils

from fastvlm.compat import attentions, hf, pytorch, targets, versions

FIVE = versions.attention_refused() is None
on_transformers_5 = pytest.mark.skipif(not FIVE, reason=str(versions.attention_refused()))


def config() -> tf.Gemma2Config:
    return tf.Gemma2Config(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def test_versions_are_read_as_numbers() -> None:
    assert versions.parsed("2.13.0+cpu") == (2, 13, 0)
    assert versions.parsed("5.17.0.dev0") == (5, 17, 0)
    assert versions.parsed("5.0.0rc1") == (5, 0, 0)
    assert versions.installed("transformers") == tf.__version__
    assert versions.installed("no-package-of-this-name") is None


def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(pytorch.is_transformed())
        return x.sin()

    x = torch.ones(2)
    note(x)
    torch.func.vmap(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        note(x)
    assert seen == [False, True, True, True]
    assert not pytorch.is_transformed()


@pytest.mark.parametrize("name", ["Bart", "MBart"])
def test_who_tells_positions_the_rows(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    decoder = getattr(module, f"{name}Decoder")
    oversight = (5, 5) <= versions.parsed(tf.__version__) < (5, 9)
    assert hf.tells_positions_the_rows(decoder.__new__(decoder)) != oversight
    assert hf.tells_positions_the_rows(nn.Linear(1, 1))


def test_dispatch_modes_are_seen() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    assert not pytorch.is_watched()
    with Mode():
        assert pytorch.is_watched()


def test_writes_are_counted_and_storages_compared() -> None:
    x, other = torch.zeros(4), torch.zeros(4)
    before = pytorch.version_of(x)
    x.add_(1)
    assert pytorch.version_of(x) != before
    assert pytorch.same_storage(x, x[1:])
    assert not pytorch.same_storage(x, other)
    with torch.inference_mode():
        assert pytorch.version_of(torch.ones(1)) is None


def test_hooks_are_seen() -> None:
    module = nn.Linear(2, 2)
    assert not pytorch.has_hooks(module)
    hook = module.register_full_backward_hook(lambda *_: None)
    assert pytorch.has_hooks(module)
    assert not pytorch.has_hooks(module, backward=False)
    hook.remove()

    def before(*_: object) -> None: ...

    hook = module.register_forward_pre_hook(before)
    assert pytorch.has_hooks(module, backward=False)
    assert pytorch.forward_hooks(module) == [before]
    hook.remove()
    assert not pytorch.has_hooks(module)


def test_hooks_of_all_modules_are_seen_but_those_that_note_names() -> None:
    assert not pytorch.has_hooks_of_all()
    with ModuleTracker():
        assert not pytorch.has_hooks_of_all()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert pytorch.has_hooks_of_all()
    hook.remove()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_product_of_onednn() -> None:
    assert pytorch.has_onednn_linear()
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    for b in (bias, None):
        assert torch.allclose(
            pytorch.onednn_linear(x, weight, b), F.linear(x, weight, b), atol=1e-5
        )


@on_transformers_5
@pytest.mark.parametrize("name", hf.OVERRIDDEN)
def test_overridden_methods_are_there_with_these_arguments(name: str) -> None:
    parameters = list(inspect.signature(getattr(GenerationMixin, name)).parameters)
    own = [p for p in parameters if p != "self"]
    assert own[: len(hf.OVERRIDDEN[name])] == list(hf.OVERRIDDEN[name])


@on_transformers_5
def test_a_cache_makes_its_layers_as_it_is_told() -> None:
    made = []

    class Layer(hf.cache_layer("DynamicLayer")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    cache = cache_utils.DynamicCache()
    hf.set_layer_maker(cache, Layer)
    assert hf.layer_maker(cache) is Layer
    for index in range(2):
        cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), index)
    assert cache.layers == made
    assert cache.get_seq_length() == 3
    assert not hf.is_offloaded(cache)
    assert hf.layer_maker(object()) is None


@on_transformers_5
def test_layers_of_static_caches_have_the_names_that_are_read() -> None:
    cache = cache_utils.StaticCache(config(), max_cache_len=8)
    assert isinstance(cache, hf.cache_layer("StaticCache"))
    kinds = {type(layer) for layer in cache.layers}
    assert kinds <= {hf.cache_layer("StaticLayer"), hf.cache_layer("StaticSlidingWindowLayer")}
    assert not hf.is_offloaded(cache)
    assert hf.cache_layer("NoSuchLayer") is object


@on_transformers_5
def test_cross_caches_note_what_is_filled() -> None:
    DynamicCache = cache_utils.DynamicCache
    cache = cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert not hf.cross_is_filled(cache)
    assert not hf.cross_is_filled(cache, 1)
    hf.set_cross_filled(cache, 1)
    assert hf.cross_is_filled(cache)
    assert hf.cross_is_filled(cache, 1)
    assert not hf.cross_is_filled(cache, 0)


@on_transformers_5
def test_a_config_names_its_attention() -> None:
    model = tf.Gemma2Model(config())
    model.set_attn_implementation("eager")
    assert attentions.attention_of(model.config) == "eager"
    other = attentions.config_with_attention(model.config, "sdpa")
    assert attentions.attention_of(other) == "sdpa"
    assert attentions.attention_of(model.config) == "eager"
    assert attentions.attention_of(copy.deepcopy(other)) == "sdpa"
    assert callable(attentions.mask_maker())


@on_transformers_5
@pytest.mark.parametrize("name", ["_sample", "_beam_search"])
def test_loops_of_transformers_are_told_from_others(name: str) -> None:
    class Other(tf.Gemma2ForCausalLM):
        def _sample(self, *args, **kwargs): ...  # type: ignore[no-untyped-def]

        def _beam_search(self, *args, **kwargs): ...  # type: ignore[no-untyped-def]

    with torch.device("meta"):
        own, other = tf.Gemma2ForCausalLM(config()), Other(config())
    assert hf.is_own_loop(getattr(own, name), name)
    assert not hf.is_own_loop(getattr(other, name), name)


@on_transformers_5
def test_generate_calls_a_loop_that_it_is_given() -> None:
    with torch.device("meta"):
        model = tf.Gemma2ForCausalLM(config())
    assert hf.takes_own_loop(model.generate)
    assert not hf.takes_own_loop(lambda *args, **kwargs: None)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    given = hf.arguments_of_generate((ids,), {"num_beams": 2})
    assert given == {"inputs": ids, "num_beams": 2}
    assert not hf.syncs_gpus(model)
    assert hf.forward_of_steps(model, tf.GenerationConfig(), {}) == model.__call__
    with hf.optimized_for_decoding(model):
        pass


@on_transformers_5
@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("beams", [False, True])
def test_what_generate_gives(encodes: bool, beams: bool) -> None:
    made = hf.generate_output(encodes, beams)(sequences=torch.ones(1), **hf.cached("cache"))
    assert hf.cache_in(made) == "cache"
    assert ("sequences_scores" in dataclasses.asdict(made)) == beams


def test_classes_are_known_by_their_names() -> None:
    class OwnRMSNorm(nn.Module): ...

    class Derived(OwnRMSNorm): ...

    assert hf.is_named(Derived(), "RMSNorm")
    assert not hf.is_named(nn.LayerNorm(2), "RMSNorm")


def test_hooks_after_a_gradient_are_silent_while_their_table_is_empty() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not pytorch.after_grad_hooks(x)
    seen: list[int] = []
    x.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    hooks = pytorch.after_grad_hooks(x)
    assert hooks is not None
    own = dict(hooks)
    hooks.clear()
    x.sum().backward()
    assert not seen
    hooks.update(own)
    x.sum().backward()
    assert seen == [1]


def test_dropouts_are_told_from_other_modules() -> None:
    assert pytorch.drops(nn.Dropout(0.1))
    assert pytorch.drops(nn.Dropout2d(0.1))
    assert not pytorch.drops(nn.Linear(1, 1))


def test_the_place_of_an_attention_setting() -> None:
    given = config()
    own, key = attentions.attention_settings(given) or ({}, "")
    own[key] = "eager"
    assert attentions.attention_of(given) == "eager"
    own[key] = "sdpa"
    assert attentions.attention_of(given) == "sdpa"
    assert attentions.attention_settings(object.__new__(type("Empty", (), {}))) is None


@on_transformers_5
def test_attention_is_registered_under_a_name_and_taken_back() -> None:
    none = {"attention": None, "mask": None}
    assert attentions.registered_attention("no-such-attention") == none
    attentions.register_attention("no-such-attention", print, attentions.whole_mask)
    found = attentions.registered_attention("no-such-attention")
    attentions.unregister_attention("no-such-attention")
    assert found == {"attention": print, "mask": attentions.whole_mask}
    assert attentions.registered_attention("no-such-attention") == none


@on_transformers_5
def test_masks_of_attention_are_never_left_out_for_a_causal_one() -> None:
    mask = attentions.whole_mask(batch_size=2, q_length=3, kv_length=3, allow_is_causal_skip=True)
    assert mask.shape == (2, 1, 3, 3)
    assert torch.equal(mask[1, 0], torch.ones(3, 3, dtype=torch.bool).tril())


@on_transformers_5
def test_files_say_which_attention_they_have() -> None:
    from transformers.models.bart import modeling_bart
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    with torch.device("meta"):
        gemma = modeling_gemma2.Gemma2Attention(config(), 0)
        bart = modeling_bart.BartAttention(8, 2)
    assert attentions.eager_attention(gemma) is modeling_gemma2.eager_attention_forward
    assert attentions.eager_attention(bart) is modeling_bart.eager_attention_forward
    assert attentions.eager_attention(nn.Linear(1, 1)) is None
    assert attentions.has_sdpa(bart)
    assert attentions.has_sdpa(nn.Linear(1, 1))
    assert not attentions.has_sdpa(object.__new__(modeling_gpt_oss.GptOssAttention))


def test_caches_of_continuous_batching_are_told_by_name() -> None:
    assert hf.is_paged(object.__new__(type("PagedAttentionCache", (), {})))
    assert not hf.is_paged(None)
    assert not hf.is_paged(cache_utils.DynamicCache())


def test_notes_on_tensors_are_forgotten_with_them() -> None:
    notes = pytorch.notes_on_tensors()
    x, same = torch.zeros(2), torch.zeros(2)
    notes[x] = "x"
    assert notes.get(x) == "x"
    assert notes.get(same) is None
    del x
    assert len(notes) == 0


@on_transformers_5
@pytest.mark.parametrize("kind", ["EncoderDecoder", "VisionEncoderDecoder"])
def test_who_hides_the_pads_that_it_makes_of_labels(kind: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    encoder = tf.BertConfig(**sizes) if kind == "EncoderDecoder" else tf.ViTConfig(**sizes)
    decoder = tf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    whole = getattr(tf, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    whole.pad_token_id, whole.decoder_start_token_id = 1, 2
    model = getattr(tf, f"{kind}Model")(config=whole)
    masks = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    given = {"input_ids": torch.ones(1, 2, dtype=torch.int64)}
    if kind != "EncoderDecoder":
        given = {"pixel_values": torch.ones(1, 3, 8, 8)}
    model(**given, labels=torch.tensor([[5, 1, -100, 6]]))
    assert targets.hands_to_decoder(model) is False
    found = targets.mask_of_targets(model, torch.tensor([[2, 5, 1, 1]]))
    assert (found is None) == (masks[0] is None)
    assert found is None or found.tolist() == [[True, True, False, False]]
    assert masks[0] is None or masks[0].tolist() == [[1, 1, 0, 0]]


@on_transformers_5
def test_what_pix2struct_makes_of_labels() -> None:
    sizes = {"hidden_size": 8, "d_kv": 8, "d_ff": 8, "num_hidden_layers": 1}
    ends = {"vocab_size": 9, "pad_token_id": 1, "decoder_start_token_id": 1}
    heads = {"num_heads": 1, "num_layers": 1}
    config = tf.Pix2StructConfig(
        text_config={**{n: v for n, v in sizes.items() if "layers" not in n}, **ends, **heads},
        vision_config={**sizes, "num_attention_heads": 1, "patch_embed_hidden_size": 4},
    )
    model = tf.Pix2StructForConditionalGeneration(config)
    given: dict[str, Any] = {}
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    labels = torch.tensor([[5, 1, -100, 6]])
    model(flattened_patches=torch.ones(1, 3, 6), labels=labels)
    ids = targets.targets_of_labels(model, labels)
    assert ids is not None
    assert torch.equal(ids, given["input_ids"])
    mask = targets.mask_of_targets(model, ids)
    assert mask is not None
    assert torch.equal(mask, given["attention_mask"] != 0)
    assert mask.tolist() == [[True, True, False, False]]
    assert not targets.hands_to_decoder(model)
