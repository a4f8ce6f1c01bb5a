"""The families that are patched, and what is left alone on purpose."""

from __future__ import annotations

from torch import nn

from fastvlm.patching import bart, davit, florenz, gemma2, t5gemma
from fastvlm.patching.rules import StackRule

# T5Gemma and Florenz before Gemma-2: their stacks have all that Gemma-2's have, and more
STACKS: tuple[StackRule, ...] = (
    *bart.STACKS,
    *t5gemma.STACKS,
    *florenz.STACKS,
    *gemma2.STACKS,
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
PREFIX_MASK = "PaliGemma gives it the masks of a prefix, which self_attention does not know"
LEFT_ALONE = {"multi_modal_projector": "runs once per image"}
# nothing of these but their linear layers is replaced
TOWERS = ("vision_tower",)


def prefix_decoders(model: nn.Module) -> set[nn.Module]:
    """Decoder-only stacks that an image-text model calls with masks of its own (PaliGemma)."""
    owners = [m for m in model.modules() if hasattr(m, "multi_modal_projector")]
    stacks = [getattr(m, "language_model", None) for m in owners]
    return {m for m in stacks if isinstance(m, nn.Module)} - {model}


def left_alone(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that a reader of the report would look for: (name, module, reason)."""
    return [
        (name, module, LEFT_ALONE[name.rsplit(".", 1)[-1]])
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in LEFT_ALONE
    ]


def tower_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the vision towers: most of what a tower computes."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and set(TOWERS) & set(name.split("."))
    ]
