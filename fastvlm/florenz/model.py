"""The Florenz models (arXiv 2503.09443), composed of transformers' own parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector,
    Florence2PreTrainedModel,
    Florence2Seq2SeqLMOutput,
    Florence2Seq2SeqModelOutput,
    Florence2VisionBackbone,
    shift_tokens_right,
)

from fastvlm.checks import fail
from fastvlm.compat import hf
from fastvlm.compat.modeling import (
    can_return_tuple,
    slice_logits_to_keep,
    torch_compilable_check,
)
from fastvlm.features.batch import images_in
from fastvlm.florenz.config import FlorenzConfig
from fastvlm.florenz.gemma import FlorenzGemmaDecoder
from fastvlm.florenz.generation import FlorenzGeneration
from fastvlm.florenz.readers import OP, check_readers, take


class FlorenzPreTrainedModel(Florence2PreTrainedModel):
    config: FlorenzConfig
    config_class = FlorenzConfig


class FlorenzModel(FlorenzPreTrainedModel):
    """Vision tower, projector, BART encoder, and BART or gated Gemma-2 decoder; no head."""

    def __init__(self, config: FlorenzConfig):
        super().__init__(config)
        self.vision_tower = Florence2VisionBackbone(config.vision_config)
        self.multi_modal_projector = Florence2MultiModalProjector(config)
        self.encoder = BartEncoder(config.encoder)
        decoder = FlorenzGemmaDecoder if config.has_gemma_decoder else BartDecoder
        self.decoder = decoder(config.decoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the prompts, as input_ids are the prompts'."""
        embeddings: nn.Module = self.encoder.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """pixel_values [I, 3, S, S] -> pooler_output [I, 1 + (S / 32)^2, d]: the spatial mean, then
        every position (paper, section 1)."""
        output = self.vision_tower(pixel_values, **kwargs)
        output.pooler_output = self.multi_modal_projector(output.last_hidden_state)
        return output

    def encode(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_of_prompt: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutput, Tensor | None]:
        """The encoder's output for the prompts [P, E, d], and the features of the images or None.

        input_ids int64 [P, E]: image_token_id where the features of the prompt's image go, in front
        (what transformers' Florence2Processor makes). inputs_embeds [P, E, d] instead of input_ids
        and pixel_values holds the features already. ValueError: neither or both, placeholders
        that do not match the images, a bad image_of_prompt.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(
                f"fastvlm.{OP}: exactly one of input_ids and inputs_embeds must be given; "
                f"got {given}"
            )
        features = None
        if input_ids is None:
            wanted = "None with inputs_embeds, which hold the features already"
            if pixel_values is not None:
                raise fail(OP, "pixel_values", wanted, pixel_values)
            if image_of_prompt is not None:
                raise fail(OP, "image_of_prompt", wanted, image_of_prompt)
        else:
            inputs_embeds, features = self._embed(input_ids, pixel_values, image_of_prompt)
        output = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return output, features

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_of_prompt: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        is_image = input_ids == self.config.image_token_id
        # the placeholder may lie outside of the vocabulary
        words = self.encoder.embed_tokens(input_ids.masked_fill(is_image, self.encoder.padding_idx))
        if pixel_values is None:
            if image_of_prompt is not None:
                raise fail(OP, "image_of_prompt", "None without pixel_values", image_of_prompt)
            torch_compilable_check(
                ~is_image.any(),
                lambda: str(fail(OP, "pixel_values", "given where input_ids have images", None)),
            )
            return words, None
        images, prompts = images_in(pixel_values), input_ids.shape[0]
        check_readers("image_of_prompt", image_of_prompt, prompts, images, ("prompts", "images"))
        features = self.get_image_features(pixel_values).pooler_output.to(words.device, words.dtype)
        length = features.shape[1]
        counts = is_image.sum(1)
        wanted = f"with {length} times image_token_id ({self.config.image_token_id}) in each row"
        torch_compilable_check(
            (counts == length).all(), lambda: str(fail(OP, "input_ids", wanted, counts.tolist()))
        )
        read = take(features, image_of_prompt)
        return words.masked_scatter(is_image.unsqueeze(-1), read), features

    @can_return_tuple
    @hf.takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_of_prompt: Tensor | None = None,
        prompt_of_target: Tensor | None = None,
        **kwargs: Any,
    ) -> Florence2Seq2SeqModelOutput:
        """As FlorenzForConditionalGeneration, without head and loss: last_hidden_state [S, L, d]
        and the rest of Florence2Seq2SeqModelOutput."""
        features = None
        # generate() of a patched model: beams in groups read the one output of their image
        shared = encoder_outputs is not None
        if encoder_outputs is None:
            encoder_outputs, features = self.encode(
                input_ids, pixel_values, attention_mask, inputs_embeds, image_of_prompt, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        states, mask = encoder_outputs.last_hidden_state, attention_mask
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            targets = states.shape[0] if prompt_of_target is None else prompt_of_target.shape[0]
            start = self.config.decoder_start_token_id
            decoder_input_ids = states.new_full((targets, 1), start).long()
        given = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        assert given is not None
        names = ("targets", "prompts")
        check_readers(
            "prompt_of_target",
            prompt_of_target,
            given.shape[0],
            states.shape[0],
            names,
            shared=shared,
        )
        if getattr(self.decoder, "takes_readers", False):
            # patched: the targets of a prompt read one copy of its keys and values
            if prompt_of_target is not None:
                kwargs["prompt_of_target"] = prompt_of_target
        else:
            states = take(states, prompt_of_target)
            mask = None if mask is None else take(mask, prompt_of_target)
        output = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            **hf.cached(past_key_values),
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Florence2Seq2SeqModelOutput(
            last_hidden_state=output.last_hidden_state,
            **hf.cached(hf.cache_in(output)),
            decoder_hidden_states=output.hidden_states,
            decoder_attentions=output.attentions,
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            image_hidden_states=features,
        )


class FlorenzForConditionalGeneration(
    FlorenzPreTrainedModel,
    FlorenzGeneration,
    GenerationMixin,  # named once more: transformers looks for it among the direct bases
):
    """A Florenz model with its head, tied to the decoder's embedding.

    FlorenzForConditionalGeneration(FlorenzConfig.of_size("3.5B")) has random weights; see
    ``from_pretrained_parts`` for those of Florence-2 and Gemma-2.
    """

    _tied_weights_keys = {  # noqa: RUF012 (as transformers declares it)
        "lm_head.weight": "model.decoder.embed_tokens.weight"
    }

    def __init__(self, config: FlorenzConfig):
        super().__init__(config)
        self.model = FlorenzModel(config)
        width, vocabulary = config.decoder.hidden_size, config.decoder.vocab_size
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: prompts and targets have vocabularies of their own."""
        raise NotImplementedError(
            "fastvlm.florenz: prompts and targets have vocabularies of their own; set vocab_size "
            "of config.encoder or config.decoder and copy the rows that stay"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. The config says what is so of a head that is the decoder's table: PEFT,
        which compares it with the prompts' table, calls it untied when it merges an adapter, and a
        checkpoint that says so has no head."""
        if self.lm_head.weight is self.model.decoder.embed_tokens.weight:
            self.config.tie_word_embeddings = True
        return super().save_pretrained(*args, **kwargs)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As FlorenzModel.get_image_features."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """labels [S, L] shifted right behind decoder_start_token_id; -100 becomes the pad id."""
        shifted: Tensor = shift_tokens_right(
            labels, self.config.pad_token_id, self.config.decoder_start_token_id
        )
        return shifted

    @can_return_tuple
    @hf.takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_of_prompt: Tensor | None = None,
        prompt_of_target: Tensor | None = None,
        **kwargs: Any,
    ) -> Florence2Seq2SeqLMOutput:
        """Images [I, 3, S, S], prompts [P, E] and targets [S, L] -> loss and logits [S, L, V].

        input_ids int64 [P, E]: 1 + (S / 32)^2 times image_token_id, then the prompt, as
            transformers' Florence2Processor makes them; attention_mask [P, E] is 0 at padding.
        labels int64 [S, L], -100 where ignored. Without decoder_input_ids the decoder reads them
            shifted right. The loss is the mean over labels, or their sum over num_items_in_batch.
        decoder_attention_mask [S, L]: default: all ones, right padding needs no mask.
        image_of_prompt int64 [P]: row p shows image image_of_prompt[p]; the vision tower runs once
            per image. prompt_of_target int64 [S]: target s reads prompt prompt_of_target[s]; the
            encoder runs once per prompt. Default for both: row r reads row r.
        encoder_outputs: of an earlier call or ``model.encode``, [P, E, d]; then attention_mask is
            still that of the prompts.

        Source: arXiv 2503.09443, section 1; final softcap 30 with either decoder.
        ValueError: arguments that do not fit together, by name.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            **hf.cached(past_key_values),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            image_of_prompt=image_of_prompt,
            prompt_of_target=prompt_of_target,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.decoder.vocab_size,
                shift_labels=labels,
                **kwargs,
            )
        return Florence2Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **hf.cached(hf.cache_in(outputs)),
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
