"""Names of transformers for models that are built of its parts (`fastvlm.florenz`): 5.5 to 5.24."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.utils import can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder

__all__ = [
    "OutputRecorder",
    "can_return_tuple",
    "merge_with_config_defaults",
    "no_init_weights",
    "slice_logits_to_keep",
    "torch_compilable_check",
]


def _slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: Any) -> Tensor:
    """hidden_states [B, L, d] at the last positions (0: all of them) or at those of a tensor."""
    last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, last, :]


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # to 5.22
    slice_logits_to_keep = _slice_logits_to_keep
