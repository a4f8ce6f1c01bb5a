"""The families that are patched: by which specs, with which classes; and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from fastvlm.compat.versions import gpt2_hides_states
from fastvlm.models import (
    bart,
    bert,
    blip,
    florenz,
    gemma2,
    gemma3,
    gpt2,
    llama,
    m2m100,
    marian,
    mllama,
    pix2struct,
    t5,
    t5gemma,
    t5gemma2,
    trocr,
    whisper,
)
from fastvlm.models.spec import Attention, Layer, Mlp, Stack
from fastvlm.nn.linear import original
from fastvlm.nn.mlp import GegluMLP
from fastvlm.patching import davit
from fastvlm.patching.decoder_stack import DecoderStack
from fastvlm.patching.encoder_stack import EncoderStack, FrameEncoderStack
from fastvlm.patching.headed_stack import HeadedStack
from fastvlm.patching.interleaved_stack import InterleavedStack
from fastvlm.patching.norms import choose_norm, choose_t5_norm, is_rms_norm
from fastvlm.patching.rules import Alias, Rule, StackRule, Swap, mistaken
from fastvlm.run.attention import PatchedAttention, is_causal
from fastvlm.run.mlp import PatchedMlp
from fastvlm.run.packed import PatchedLayer

Choose = Callable[[nn.Module], Swap | str]


def _choice(read: Callable[[Any], Any], swap: Callable[[Any, Any], Swap]) -> Choose:
    """What a module becomes by the spec that read gives; or its reason, or why it cannot be."""

    def choose(module: nn.Module) -> Swap | str:
        spec = read(module)
        if isinstance(spec, str):
            return spec
        first = getattr(spec, "reads", "hidden_states")
        return mistaken(module, (first, *spec.arguments)) or swap(module, spec)

    return choose


def _aliases(spec: Attention | Stack) -> tuple[tuple[str, Any], ...]:
    return tuple((ours, Alias(theirs)) for ours, theirs in spec.aliases)


def _attention(module: Any, spec: Attention) -> Swap:
    crosses = spec.cross or (spec.states is not None and getattr(module, "is_decoder", True))
    causal = not spec.cross and is_causal(module, spec)
    runs_on: tuple[str, ...] = ("cross_attention",) if crosses else ()
    if causal or not crosses:
        both = runs_on if spec.causal is None else ()
        cached = ("cached_attention",) if causal else ()
        runs_on = (*(("rope",) if spec.rotary else ()), "self_attention", *both, *cached)
    return Swap(PatchedAttention, runs_on, (("spec", spec), *_aliases(spec)))


def _layer(module: Any, spec: Layer) -> Swap:
    ops = {
        "gelu_mlp": any(isinstance(r.branch, Mlp) for r in spec.residuals),
        "residual_layer_norm": any(r.norm for r in spec.residuals),
        "residual_rms_norm": any(r.after for r in spec.residuals),
    }
    found = tuple(op for op, runs in ops.items() if runs) or ("Layout",)
    return Swap(PatchedLayer, found, (("spec", spec),))


def _mlp(module: Any) -> Swap | str:
    spec = gemma2.read_mlp(module)
    if isinstance(spec, str):
        return spec
    attributes = ("activation", spec.activation), ("evaluated", spec.evaluated), ("spec", spec)
    return Swap(GegluMLP, ("geglu_mlp",), attributes)


def _nested_mlp(read: Any, module: Any) -> Swap | str:
    spec = read(module)
    if isinstance(spec, str):
        return spec
    op = "gelu_mlp" if spec.gate is None else "geglu_mlp"
    return Swap(PatchedMlp, (op,), (("spec", spec),))


def _stack(decodes: bool, module: Any, spec: Stack) -> Swap:
    encoder = EncoderStack if spec.reads == "input_ids" else FrameEncoderStack
    decoder = InterleavedStack if spec.interleaved else DecoderStack
    decoder = decoder if spec.head is None else HeadedStack
    attributes = (("spec", spec), *_aliases(spec))
    return Swap(decoder if decodes else encoder, ("Layout",), attributes)


def _attention_rule(matches: Any, read: Any) -> Rule:
    return Rule(("attention",), matches, _choice(read, _attention))


def _layer_rule(matches: Any, read: Any, *floors: str) -> Rule:
    return Rule(floors, matches, _choice(read, _layer))


def _stack_rule(
    matches: Any, read: Any, rules: tuple[Rule, ...], known: tuple[str, ...], decodes: bool = True
) -> StackRule:
    return StackRule(matches, _choice(read, partial(_stack, decodes)), rules, decodes, known)


_BART = (
    _attention_rule(bart.is_attention, bart.read_attention),
    _layer_rule(bart.is_layer, bart.read_layer, "mlp", "norm"),
)
_TROCR = (
    _attention_rule(trocr.is_attention, trocr.read_attention),
    _layer_rule(bart.is_layer, trocr.read_layer, "mlp", "norm"),
)
_GEMMA2 = (
    _attention_rule(gemma2.is_attention, gemma2.read_attention),
    Rule(("mlp",), gemma2.is_mlp, _mlp),
    Rule(("norm",), is_rms_norm, choose_norm),
    _layer_rule(gemma2.is_layer, gemma2.read_layer, "norm"),
)
_T5GEMMA = (
    _attention_rule(t5gemma.is_cross_attention, t5gemma.read_cross_attention),
    _layer_rule(t5gemma.is_layer, t5gemma.read_layer, "norm"),
    *_GEMMA2,
)
_GEMMA3 = (_attention_rule(gemma3.is_attention, gemma3.read_attention), *_GEMMA2)
_T5GEMMA2 = (
    _attention_rule(t5gemma2.is_merged_attention, t5gemma2.read_merged_attention),
    _attention_rule(gemma3.is_attention, t5gemma2.read_attention),
    _layer_rule(t5gemma2.is_layer, t5gemma2.read_layer, "norm"),
    *_GEMMA2,
)
_FLORENZ = (_layer_rule(florenz.is_layer, florenz.read_layer, "norm"), *_T5GEMMA)
_LLAMA = (
    _attention_rule(llama.is_attention, llama.read_attention),
    _layer_rule(llama.is_layer, llama.read_layer, "norm"),
    *_GEMMA2[1:3],
)
_MLLAMA = (
    _attention_rule(mllama.is_cross_attention, mllama.read_cross_attention),
    _attention_rule(mllama.is_self_attention, mllama.read_self_attention),
    _layer_rule(mllama.is_layer, mllama.read_layer, "norm"),
    *_GEMMA2[1:3],
)

_T5 = (
    _attention_rule(t5.is_attention, t5.read_attention),
    Rule(("mlp",), t5.is_mlp, partial(_nested_mlp, t5.read_mlp)),
    Rule(("norm",), t5.is_norm, choose_t5_norm),
    _layer_rule(t5.is_layer, t5.read_layer, "mlp", "norm"),
)
_PIX2STRUCT_TOWER = (
    Rule(("mlp",), t5.is_mlp, partial(_nested_mlp, t5.read_mlp)),
    Rule(("norm",), pix2struct.is_norm, choose_t5_norm),
)
# its stack hands to its layers alone what attention reads, so that they belong to its attention
_PIX2STRUCT = (
    _attention_rule(pix2struct.is_attention, pix2struct.read_attention),
    *_PIX2STRUCT_TOWER,
    _layer_rule(pix2struct.is_layer, pix2struct.read_layer, "attention"),
)
# its layers hand their cross-attention nothing, so that they belong to its attention
_GPT2 = (
    _attention_rule(gpt2.is_attention, gpt2.read_attention),
    Rule(("mlp",), gpt2.is_mlp, partial(_nested_mlp, gpt2.read_mlp)),
    _layer_rule(gpt2.is_layer, gpt2.read_layer, "attention"),
)

_BERT = (
    _attention_rule(bert.is_attention, bert.read_attention),
    _layer_rule(bert.is_layer, bert.read_layer, "mlp", "norm"),
)
_BLIP = (
    _attention_rule(blip.is_attention, blip.read_attention),
    _layer_rule(bert.is_layer, blip.read_layer, "mlp", "norm"),
)


def _two_stacks(family: Any, rules: tuple[Rule, ...]) -> tuple[StackRule, StackRule]:
    """The encoder and the decoder of a family that has both."""

    def rule(decodes: bool) -> StackRule:
        matches, read = (
            partial(test, decodes=decodes) for test in (family.is_stack, family.read_stack)
        )
        return _stack_rule(matches, read, rules, family.KNOWN, decodes)

    return rule(False), rule(True)


# T5Gemma and Florenz before Gemma-2: their stacks have all that Gemma-2's have, and more, as do
# Gemma-3's and T5Gemma 2's, which normalize queries and keys; Marian's and TrOCR's before BART's:
# BlenderbotSmall and TrOCR have all names of it
STACKS: tuple[StackRule, ...] = (
    _stack_rule(trocr.is_stack, trocr.read_stack, _TROCR, trocr.KNOWN),
    *_two_stacks(marian, _BART),
    *_two_stacks(bart, _BART),
    *_two_stacks(m2m100, _BART),
    *_two_stacks(whisper, _BART),
    _stack_rule(bert.is_stack, bert.read_stack, _BERT, bert.KNOWN),
    _stack_rule(blip.is_stack, blip.read_stack, _BLIP, blip.KNOWN),
    *_two_stacks(t5, _T5),
    _stack_rule(pix2struct.is_stack, pix2struct.read_stack, _PIX2STRUCT, pix2struct.KNOWN),
    _stack_rule(
        gpt2.is_stack,
        gpt2.read_stack,
        _GPT2,
        gpt2.KNOWN if gpt2_hides_states() else (),  # else each is tried, and found out
    ),
    *_two_stacks(t5gemma2, _T5GEMMA2),
    *_two_stacks(t5gemma, _T5GEMMA),
    _stack_rule(gemma3.is_stack, gemma3.read_stack, _GEMMA3, gemma3.KNOWN),
    _stack_rule(florenz.is_stack, florenz.read_stack, _FLORENZ, florenz.KNOWN),
    _stack_rule(mllama.is_stack, mllama.read_stack, _MLLAMA, mllama.KNOWN),
    _stack_rule(llama.is_stack, lambda module: llama.STACK, _LLAMA, llama.KNOWN),
    _stack_rule(gemma2.is_stack, lambda module: gemma2.STACK, _GEMMA2, gemma2.KNOWN),
)

KNOWN = tuple(path for stack in STACKS for path in stack.known)
# where the classes with a head and a loss stand that the tests build
LANGUAGE_MODELS = (
    *KNOWN,
    *davit.KNOWN,
    "transformers.models.paligemma.",
    "transformers.models.vision_encoder_decoder.",
    "transformers.models.speech_encoder_decoder.",
    "transformers.models.encoder_decoder.",
)
ENCODES = "its rows see all others here: nothing with a head over tokens calls it"
PREFIX_MASK = "PaliGemma gives it the masks of a prefix, which self_attention does not know"
LEFT_ALONE = {"multi_modal_projector": "runs once per image"}
# nothing of these but their linear layers is replaced
TOWERS = ("vision_tower",)


def prefix_decoders(model: nn.Module) -> set[nn.Module]:
    """Decoder-only stacks that an image-text model calls with masks of its own (PaliGemma)."""
    owners = [m for m in model.modules() if hasattr(m, "multi_modal_projector")]
    stacks = [getattr(m, "language_model", None) for m in owners]
    modules = [m for m in stacks if isinstance(m, nn.Module)]
    found = {m for m in modules if not (mllama.is_stack(m) or llama.is_stack(m))}
    return found - {model}


def refusals(model: nn.Module) -> dict[nn.Module, str]:
    """Stacks that what is around them calls as none of our stacks runs, each with the reason."""
    return {
        **dict.fromkeys(prefix_decoders(model), PREFIX_MASK),
        **dict.fromkeys(blip.encoders(model), ENCODES),
    }


def left_alone(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that a reader of the report would look for: (name, module, reason)."""
    return [
        (name, module, LEFT_ALONE[name.rsplit(".", 1)[-1]])
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in LEFT_ALONE
    ]


def tower_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule, tuple[str, ...]]]:
    """The parts of vision towers that get an op: name, module, rule, and where known ones stand."""
    for each in davit.tower_modules(model):
        yield *each, davit.KNOWN
    for name, part in _parts_of_pix2structs_tower(model):
        rule = next((r for r in _PIX2STRUCT_TOWER if r.matches(part)), None)
        if rule is not None:
            yield name, part, rule, pix2struct.KNOWN


def _parts_of_pix2structs_tower(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in pix2struct.tower_parts(model):
        yield from part.named_modules(prefix=name)


def tower_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the vision towers: most of what a tower computes."""
    found = (*_parts_of_towers(model), *_parts_of_pix2structs_tower(model))
    return [(name, module) for name, module in found if isinstance(module, nn.Linear)]


def tower_convs(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions of the vision towers that read every channel: patch embeddings, and those
    between stages."""
    return [
        (name, module)
        for name, module in _parts_of_towers(model)
        if isinstance(module, nn.Conv2d) and original(type(module)) is nn.Conv2d
        if module.groups == 1
    ]


def _parts_of_towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (each for each in model.named_modules() if set(TOWERS) & set(each[0].split(".")))
