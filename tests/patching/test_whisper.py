"""Whisper's own generate() goes on working: languages, timestamps, long sound, temperatures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import trainer_copy
from models import EOS, PAD, VOCAB, _whisper_inputs, whisper
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import fastvlm
from fastvlm.run import build

START, PREVIOUS, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, NO_TIMES = range(70, 77)


@pytest.fixture
def model() -> nn.Module:
    """With the settings of a checkpoint for many languages; tokens from NO_TIMES on are times."""
    model = whisper()
    settings: dict[str, Any] = {
        "decoder_start_token_id": START,
        "prev_sot_token_id": PREVIOUS,
        "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
        "no_timestamps_token_id": NO_TIMES,
        "max_initial_timestamp_index": 5,
        "is_multilingual": True,
        "alignment_heads": [[0, 1], [1, 2]],
        "suppress_tokens": [PAD, 5],
        "begin_suppress_tokens": [6, EOS],
        "max_length": 40,
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def clips(frames: int = 24) -> Tensor:
    return torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(4))


LONG = {
    "return_timestamps": True,
    "attention_mask": torch.tensor([[1] * 48, [1] * 36 + [0] * 12]),
}
CASES: dict[str, dict[str, Any]] = {
    "language": {"language": "de", "task": "translate"},
    "detected-language": {},
    "timestamps": {"return_timestamps": True, "num_beams": 3},
    "prompt": {"prompt_ids": torch.tensor([PREVIOUS, 8, 9, 10]), "language": "en"},
    "token-timestamps": {"return_token_timestamps": True, "language": "en", "num_beams": 2},
    "rows-return": {"num_beams": 4, "num_return_sequences": 2, "language": "en"},
    "static": {"cache_implementation": "static", "language": "en"},
    "long": LONG,
    "long-beams": {**LONG, "num_beams": 2, "language": "en"},
    "long-fallback": {
        **LONG,
        "temperature": (0.0, 0.8),
        "logprob_threshold": -0.5,
        "compression_ratio_threshold": 1.35,
        "no_speech_threshold": 0.2,
        "condition_on_prev_tokens": True,
    },
}


def _written(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(3)
    np.random.seed(3)
    long = "attention_mask" in settings
    settings = {**copy.deepcopy(settings), "max_new_tokens": 6 if long else 10}
    settings["no_repeat_ngram_size"] = 2
    out = model.generate(clips(48 if long else 24), **settings)
    return out if isinstance(out, dict) else {"sequences": out}


@pytest.mark.parametrize("case", CASES)
def test_its_own_generate_writes_the_same(model: nn.Module, case: str) -> None:
    expected = _written(model, CASES[case])
    fastvlm.patch(model)
    got = _written(model, CASES[case])
    assert torch.equal(got["sequences"], expected["sequences"])
    if "token_timestamps" in expected:
        assert torch.allclose(got["token_timestamps"], expected["token_timestamps"], atol=1e-4)
    assert len(set(expected["sequences"].flatten().tolist())) > 5


def test_what_a_dict_holds(model: nn.Module) -> None:
    ask = {"return_dict_in_generate": True, "output_scores": True, "language": "en"}
    expected = _written(model, ask)
    fastvlm.patch(model)
    got = _written(model, ask)
    for ours, theirs in zip(got["scores"], expected["scores"]):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for name in ("self_attention_cache", "cross_attention_cache"):
        for ours, theirs in zip(
            *(getattr(x["past_key_values"], name).layers for x in (got, expected))
        ):
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
            assert torch.allclose(ours.values, theirs.values, atol=1e-4)


def test_a_step_is_written_down_positions_included(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that begin in several columns, too: they bring their positions."""
    made: list[Any] = []
    monkeypatch.setattr(
        build,
        "build_step",
        lambda *args, _build=build.build_step: made.append(_build(*args)) or made[-1],
    )
    ids = torch.tensor([[START, ENGLISH, TRANSCRIBE, NO_TIMES], [PAD, PAD, START, ENGLISH]])
    mask = (ids != PAD).long()
    plain = copy.deepcopy(model)
    fastvlm.patch(model)

    def steps(model: nn.Module) -> list[Tensor]:
        past, found, tokens, seen = None, [], ids, mask
        states = BaseModelOutput(model.model.encoder(clips()).last_hidden_state)
        for new in ([8, 9], [10, 11], [12, 13]):
            positions = (seen.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            out = model(
                encoder_outputs=states,
                decoder_input_ids=tokens,
                decoder_attention_mask=seen,
                decoder_position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past, tokens = out.past_key_values, torch.tensor(new).unsqueeze(1)
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], 1)
            found.append(out.logits[:, -1])
        return found

    with torch.no_grad():
        for ours, theirs in zip(steps(model), steps(plain)):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert made
    assert None not in made


def test_without_a_cache_its_layers_read_none(model: nn.Module) -> None:
    """Whisper gives a cache that is not asked for to nobody."""
    plain = copy.deepcopy(model)
    fastvlm.patch(model)

    def run(model: nn.Module) -> Tensor:
        batch = {"input_features": clips(), "decoder_input_ids": torch.full((2, 3), 7)}
        past = model(**batch, use_cache=True).past_key_values
        assert isinstance(past, EncoderDecoderCache)
        batch["decoder_input_ids"] = torch.full((2, 1), 8)
        return model(**batch, past_key_values=past, use_cache=False).logits

    with torch.no_grad():
        assert torch.allclose(run(model), run(plain), atol=1e-4)


def test_a_mask_of_its_frames_changes_nothing(model: nn.Module) -> None:
    encoder, mask = model.model.encoder, torch.tensor([[1] * 24, [1] * 10 + [0] * 14])
    with torch.no_grad():
        expected = encoder(clips(), attention_mask=mask).last_hidden_state
        fastvlm.patch(model)
        got = encoder(clips(), attention_mask=mask).last_hidden_state
    assert torch.allclose(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match="mel input features to be of length 24"):
        encoder(clips(22))


def test_several_targets_read_one_clip(model: nn.Module) -> None:
    """The encoder runs once a clip: loss and gradients are those of a copy for each target."""
    batch = _whisper_inputs(model)["input_features"][:2]
    labels = torch.randint(7, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
    labels[1, 3:] = labels[3, 4:] = -100
    reads = torch.tensor([0, 0, 1, 1])
    plain = copy.deepcopy(model).train()
    fastvlm.patch(model.train())
    loss = model(batch, labels=labels, prompt_of_target=reads).loss
    expected = plain(batch[reads], labels=labels).loss
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        if theirs.grad is not None:
            assert torch.allclose(
                ours.grad, theirs.grad, atol=1e-4 + 1e-4 * theirs.grad.abs().max()
            )


def test_a_copy_whose_encoder_reads_its_mask_keeps_it() -> None:
    """Whisper never looks at the mask of its frames; what somebody made of it may."""
    model = trainer_copy.build(
        "whisper",
        ("                    None,\n", "                    mask,\n"),
        (
            "inputs_embeds = inputs_embeds.permute(0, 2, 1)",
            "inputs_embeds = inputs_embeds.permute(0, 2, 1)\n"
            "        mask = attention_mask\n"
            "        mask = None if mask is None else mask[:, None, None, :] == 1",
        ),
    )
    encoder = model.model.encoder
    mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    with torch.no_grad():
        expected = [
            encoder(clips(), attention_mask=each).last_hidden_state for each in (mask, None)
        ]
        assert not fastvlm.patch(model).skipped
        got = [encoder(clips(), attention_mask=each).last_hidden_state for each in (mask, None)]
    assert not torch.allclose(*expected, atol=1e-2)
    for ours, theirs in zip(got, expected):
        assert torch.allclose(ours, theirs, atol=1e-4)
