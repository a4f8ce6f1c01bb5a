"""The families that are patched, and what is left alone on purpose."""

from __future__ import annotations

from torch import nn

from fastvlm.patching import bart, gemma2, t5gemma
from fastvlm.patching.rules import StackRule

# T5Gemma before Gemma-2: its stacks have all that Gemma-2's have, and more
STACKS: tuple[StackRule, ...] = (*bart.STACKS, *t5gemma.STACKS, *gemma2.STACKS)

LEFT_ALONE = {
    "vision_tower": "the vision tower has no kernel of ours yet",
    "multi_modal_projector": "runs once per image",
}


def left_alone(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that a reader of the report would look for: (name, module, reason)."""
    return [
        (name, module, LEFT_ALONE[name.rsplit(".", 1)[-1]])
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in LEFT_ALONE
    ]
