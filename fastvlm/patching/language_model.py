"""The model class around stacks and head: a loss without logits, generate() without copies.

A call with labels computes its loss through `fastvlm.ops.linear_cross_entropy`; in training it also
fills no cache and leaves out the decoder's rows behind the last label. transformers' own forward
runs all the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastvlm.checks import describe
from fastvlm.compat import hf, targets
from fastvlm.decoding.prefixes import decoder_stack
from fastvlm.loss.request import LossRequest, loss_request, reading, requesting
from fastvlm.models.structure import takes
from fastvlm.nn.linear import Linear, is_plain
from fastvlm.patching import padded_labels
from fastvlm.patching.decoder_stack import DecoderStack
from fastvlm.patching.generation import OwnLoop, forward_of, recording_for
from fastvlm.patching.interposed import NOTHING, interposed
from fastvlm.patching.logits import LazyLogits, State, settled
from fastvlm.patching.recorded import RecordedLogits
from fastvlm.patching.room import RoomForAll
from fastvlm.patching.rules import Swap
from fastvlm.patching.shared_states import SharedEncoderStates
from fastvlm.patching.tied import head_weight
from fastvlm.run.layouts import READERS, restarts, wants_attentions, wants_hidden_states
from fastvlm.run.mixin import Mixin
from fastvlm.run.static import StaticMasks

IMAGES = "image_of_prompt"


class LossHead(Mixin):
    """An output head that gives lazy logits to the model's own forward, when that has labels, or
    when a decoding loop wants to know what it makes of them."""

    gives_lazy_logits = True

    def forward(self, input: Tensor) -> Any:
        request, recorded = loss_request(), False
        if request is not None and not (request.defers and request.head is self):
            return super().forward(input)
        if request is None and not torch.compiler.is_compiling():
            recorded = recording_for(self)
        if not (recorded or request is not None) or not is_plain(self):
            return super().forward(input)
        state = State.now(input, None if request is None else self.weight)
        casts = state.autocast is not None and input.dtype != torch.float64
        dtype = state.autocast if casts and state.autocast is not None else input.dtype
        if request is None:
            request = LossRequest()
            return RecordedLogits(input, self.weight, self.bias, request, dtype, state, head=self)
        packed = request.packed if request.packed and request.packed.is_shown_by(input) else None
        weight = head_weight(self.weight, request)
        return LazyLogits(input, weight, self.bias, request, dtype, state, packed=packed)


class Head(LossHead, Linear):
    """The same over `fastvlm.ops.linear`, where there are no labels."""


HEAD = Swap(Head, ("linear", "linear_cross_entropy", "linear_topk"))
LOSS_HEAD = Swap(LossHead, ("linear_cross_entropy", "linear_topk"))


def last_label(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """labels [B, L] -> bool [B, L]: the row's last label, and all before it.

    A causal decoder's rows behind it reach neither the loss nor a row before them.
    """
    counts = (labels != ignore_index).long()
    return counts.flip(1).cumsum(1).flip(1) > 0


def _fail(argument: str, wanted: str, given: object) -> ValueError:
    return ValueError(f"fastvlm: {argument} must be {wanted}; got {describe(given)}")


def _indices(name: str, value: Any, rows: int | None) -> None:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != torch.int64:
        raise _fail(name, "an int64 tensor of one dimension", value)
    if rows is not None and value.shape[0] != rows:
        raise _fail(name, f"of one entry for each of the {rows} rows", value)


class LoopModel(StaticMasks, RoomForAll, OwnLoop):
    """A model whose generate() runs fastvlm's loop, and whose loss is its own: its head computes
    with a weight of fewer bits, which is for decoding."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with forward_of(self) as recorded:
            outputs = super().forward(*args, **kwargs)
            return settled(outputs) if recorded else outputs


class LossModel(StaticMasks, RoomForAll, OwnLoop):
    """A model whose call with labels has no logits, unless somebody looks at them.

    Besides what the model itself takes, its forward takes
    image_of_prompt: int64 [P], the image in pixel_values [I, ...] of each row of input_ids [P, E]:
        the vision tower runs once for an image.
    prompt_of_target: int64 [S], the row of input_ids that each row of labels (or
        decoder_input_ids) [S, L] reads: the encoder runs once for a prompt.
    groups: int64 [S] with values in [0, num_groups), the (task, language) of each row of labels;
        the output then has group_losses (summed loss) and group_tokens, [num_groups] each.
    """

    keeps_signature = True
    # whether a label counts in its own row or the one before, so that rows behind the last one of a
    # text reach no loss: as in every class that the tests build
    shifts_as_known = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            own = inspect.signature(super().forward)
            kwargs = {**own.bind_partial(*args).arguments, **kwargs}
        if kwargs.get(IMAGES) is not None and not takes(self, IMAGES):
            self._place_images(kwargs)
        labels = kwargs.get("labels")
        groups, num_groups = kwargs.pop("groups", None), kwargs.pop("num_groups", None)
        self._check(kwargs, labels, groups, num_groups)
        readers = None if takes(self, READERS) else kwargs.get(READERS)
        if torch.compiler.is_compiling():
            if groups is not None:
                raise _fail("groups", "left out where the whole model is compiled", groups)
            if readers is not None and not targets.hands_to_decoder(self):
                raise _fail(READERS, "left out where the model is compiled", readers)
            return super().forward(**kwargs)
        decoder = _decoder_of(self)
        if readers is not None and (decoder is None or not decoder.takes_readers):
            raise _fail(READERS, "left out: its decoder is not patched", readers)
        with reading(decoder, readers) as read:
            outputs = self._called(kwargs, decoder, groups, num_groups)
        if readers is not None and not (read.taken or targets.hands_to_decoder(self)):
            raise _fail(
                READERS, "left out: it did not reach the decoder, which is compiled", readers
            )
        return outputs

    def _called(
        self, kwargs: dict[str, Any], decoder: DecoderStack | None, groups: Any, num_groups: Any
    ) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            around = loss_request()
            if around is not None and decoder is not None and around.decoder is decoder:
                with around.within():
                    return super().forward(**kwargs)
            with requesting(None), forward_of(self) as recorded:
                outputs = super().forward(**kwargs)
                return settled(outputs) if recorded else outputs
        if self.training and torch.is_grad_enabled():
            padded_labels.look(self, labels)
        # with labels that the caller has shifted, these say nothing of the rows that count
        shifted = kwargs.get("shift_labels") is not None
        hidden = shifted or self._hides_labels(kwargs, labels)
        if self.training:  # in evaluation logits and caches are looked at, there too
            if kwargs.get("use_cache") is None:
                kwargs["use_cache"] = False
            if not shifted:
                self._without_tail(kwargs, labels)
        head = self.get_output_embeddings()
        request = LossRequest(head, decoder, groups, num_groups, hidden_labels=hidden)
        with requesting(request):
            outputs = settled(super().forward(**kwargs), request, self.training)
        request.done()
        if groups is not None and (request.group_losses is None or isinstance(outputs, tuple)):
            raise ValueError(
                "fastvlm: groups must be left out where the head is no plain nn.Linear (an "
                "adapter, a hook), the loss is not transformers' own, or return_dict=False"
            )
        return outputs

    def _check(self, kwargs: dict[str, Any], labels: Any, groups: Any, num_groups: Any) -> None:
        rows = labels.shape[0] if isinstance(labels, Tensor) else None
        if kwargs.get(READERS) is None:
            kwargs.pop(READERS, None)
        else:
            if not self.config.is_encoder_decoder:
                raise _fail(READERS, "left out: the model has no encoder", kwargs[READERS])
            _indices(READERS, kwargs[READERS], rows)
        if groups is None and num_groups is None:
            return
        if labels is None:
            raise _fail("groups", "given together with labels", groups)
        _indices("groups", groups, rows)
        if not isinstance(num_groups, int) or num_groups < 1:
            raise _fail("num_groups", "a whole number, 1 or more, beside groups", num_groups)

    def _without_tail(self, kwargs: dict[str, Any], labels: Tensor) -> None:
        """A mask of the decoder's rows that reach the loss, where the caller gives none."""
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        mask, embeds = (kwargs.get(prefix + name) for name in ("attention_mask", "inputs_embeds"))
        decoder = _decoder_of(self)
        if decoder is None or mask is not None or labels.dim() != 2 or not self.shifts_as_known:
            return
        if interposed(decoder) != NOTHING or decoder.sees_all(kwargs):
            return  # somebody looks at these rows
        if wants_hidden_states(decoder, kwargs) or wants_attentions(decoder, kwargs):
            return
        if restarts(kwargs.get(prefix + "position_ids")):
            return
        if hf.cache_in(kwargs) is not None:
            return
        ids = self._target_ids(kwargs, labels)
        given = ids if ids is not None else embeds
        if given is not None and given.shape[:2] != labels.shape:
            return
        mask, default = last_label(labels), self._default_mask(decoder, kwargs, ids)
        kwargs[prefix + "attention_mask"] = mask if default is None else mask & default

    def _target_ids(self, kwargs: dict[str, Any], labels: Tensor) -> Tensor | None:
        """The token ids that the decoder will be given, as far as they are known up front."""
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        ids: Tensor | None = kwargs.get(prefix + "input_ids")
        if ids is None and kwargs.get(prefix + "inputs_embeds") is None:
            ids = targets.targets_of_labels(self, labels)
        return ids

    def _default_mask(
        self, decoder: DecoderStack, kwargs: dict[str, Any], ids: Tensor | None
    ) -> Tensor | None:
        """The mask of target ids that is assumed where none is given; None is all ones."""
        given = kwargs.get("decoder_input_ids") is not None
        mask = None if ids is None or given else targets.mask_of_targets(self, ids)
        return decoder.default_mask(ids) if mask is None else mask

    def _hides_labels(self, kwargs: dict[str, Any], labels: Tensor) -> bool:
        """Whether a label may count in a row that the caller's mask, or the decoder's, hides."""
        encodes = self.config.is_encoder_decoder
        mask = kwargs.get("decoder_attention_mask" if encodes else "attention_mask")
        decoder = _decoder_of(self)
        if mask is None and decoder is not None:
            mask = self._default_mask(decoder, kwargs, self._target_ids(kwargs, labels))
        if not isinstance(mask, Tensor):
            return False
        return padded_labels.hides_labels(mask, labels)

    def _encodes_here(self) -> bool:
        """Whether generate() hands the prompts and images to a method of the model to encode."""
        return hf.encode_method(self.config) is not None and not takes(self, IMAGES)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if self._encodes_here():
            model_kwargs.pop(IMAGES, None)  # of a copy: the signature is the model's own
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get(IMAGES) is not None and self._encodes_here():
            names = (IMAGES, "pixel_values", "encoder_outputs")
            placed = {"input_ids": inputs_tensor, **{n: model_kwargs.get(n) for n in names}}
            self._place_images(placed)
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in names[:2]}
            if (embeds := placed.get("inputs_embeds")) is not None:
                model_kwargs["inputs_embeds"] = embeds
        encode: Any = getattr(super(), str(hf.encode_method(self.config)))
        return encode(inputs_tensor, model_kwargs, *args, **kwargs)

    # its name to transformers 5.22
    _prepare_encoder_decoder_kwargs_for_generation = _maybe_prepare_encoder_kwargs_for_generation

    def _place_images(self, kwargs: dict[str, Any]) -> None:
        """Token embeddings with each row's image in place, as the model would make them."""
        index, ids, pixels = (kwargs.get(name) for name in (IMAGES, "input_ids", "pixel_values"))
        if pixels is None and kwargs.get("encoder_outputs") is not None:
            kwargs.pop(IMAGES)
            return
        if not hasattr(self, "get_image_features") or not hasattr(self, "get_placeholder_mask"):
            raise _fail(IMAGES, "left out: the model places no images", index)
        if ids is None or pixels is None:
            raise _fail(IMAGES, "given together with input_ids and pixel_values", index)
        _indices(IMAGES, index, ids.shape[0])
        kwargs.pop(IMAGES)
        features = self.get_image_features(kwargs.pop("pixel_values")).pooler_output
        embeds = self.get_input_embeddings()(kwargs.pop("input_ids"))
        features = features.index_select(0, index).to(embeds.device, embeds.dtype)
        where = self.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
        kwargs["inputs_embeds"] = embeds.masked_scatter(where, features)


def _decoder_of(model: Any) -> DecoderStack | None:
    stack = decoder_stack(model)
    return stack if isinstance(stack, DecoderStack) else None


class LossAndSharedStates(LossModel, SharedEncoderStates):
    pass


class LoopAndSharedStates(LoopModel, SharedEncoderStates):
    pass


def has_loss(module: Any) -> bool:
    return isinstance(module, LossModel)


def runs_loop(module: Any) -> bool:
    return isinstance(module, OwnLoop)


def shares_states(module: Any) -> bool:
    return isinstance(module, SharedEncoderStates)


def head(module: Any, linear: bool) -> Swap:
    """The swap of the head; linear: whether its products are to be fastvlm's as well."""
    return HEAD if linear or isinstance(module, Linear) else LOSS_HEAD


def choose(shares: bool, loss: bool, loops: bool, known: bool) -> Swap:
    """The swap of a model class that shares encoder states, computes losses, which runs fastvlm's
    decoding loop as well, runs that alone, or does two of these.

    known: whether the tests build it.
    """
    states = ("one copy of the encoder states",) if shares else ()
    without = ("linear_cross_entropy",) if loss else ("decoding loop",) if loops else ()
    if loss:
        mixin: type = LossAndSharedStates if shares else LossModel
    elif loops:
        mixin = LoopAndSharedStates if shares else LoopModel
    else:
        mixin = SharedEncoderStates
    attributes = () if known or not loss else (("shifts_as_known", False),)
    return Swap(mixin, (*states, *without), attributes)
