"""generate() of a patched model that reads an encoder: one copy of its states for all readers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.models.structure import takes
from fastvlm.patching.room import RoomForAll
from fastvlm.run.static import StaticMasks

# options of generate() that call the model with what one copy of an image cannot serve -> what
# they may be, and why
_REFUSED = {
    "guidance_scale": (
        (None, 1),
        "its second pass gives the encoder what the decoder wrote, and other keys to each step",
    ),
    "prefill_chunk_size": ((None,), "it cuts the encoder's mask to the length of each chunk"),
}


# of Mllama: what is one row for each text, and the mask that says which keys of it are seen
_PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
_SEEN = "cross_attention_mask"


class SharedEncoderStates(StaticMasks, RoomForAll):
    """generate() without a copy of the encoder's states for each beam or returned sequence."""

    def _prefill(self, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        for name, (allowed, why) in (_REFUSED if self.config.is_encoder_decoder else {}).items():
            if (given := getattr(generation_config, name, None)) not in allowed:
                raise ValueError(
                    f"fastvlm: {name} must be left out in generate() of a patched encoder-decoder: "
                    f"{why}; got {given}. fastvlm.unpatch(model) generates with it"
                )
        prefill: Any = super()._prefill  # type: ignore[misc]
        return prefill(input_ids, generation_config, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        names: tuple[str, ...] = ("encoder_outputs", "attention_mask")
        if not is_encoder_decoder:  # states that the caller brought (BLIP)
            names = ("encoder_hidden_states", "encoder_attention_mask")
        # pictures, by whose mask the decoder knows what each row sees (Mllama)
        sees = getattr(getattr(decoder_stack(self), "spec", None), "interleaved", False)
        if sees and takes(self, *_PICTURES) and model_kwargs.get(_SEEN) is not None:
            names = _PICTURES
        if expand_size == 1 or model_kwargs.get(names[0]) is None:
            return expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        kept = {name: model_kwargs.pop(name) for name in names if name in model_kwargs}
        wanted: dict[str, Any] = {"encoder_outputs": {}} if is_encoder_decoder else {}
        input_ids, expanded = expand(
            expand_size, is_encoder_decoder, input_ids, **wanted, **model_kwargs
        )
        expanded.update(kept)
        return input_ids, expanded
