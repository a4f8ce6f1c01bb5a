"""A model put together from checkpoints, and Florence-2's embedding over another vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import config, images, spread, targets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
)

from fastvlm.florenz import from_pretrained_parts, parameter_counts, remapped_embedding


def florence() -> Florence2ForConditionalGeneration:
    torch.manual_seed(0)
    small = config("0.4B")
    text = small.encoder.to_dict() | {"forced_eos_token_id": None, "decoder_start_token_id": 2}
    model = Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=small.vision_config.to_dict(), text_config=text, image_token_id=88
        )
    )
    return spread(model)  # type: ignore[return-value]


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    fields = config("3.5B").decoder.to_dict()
    fields.pop("cross_attention_hidden_size")
    # to 5.22 Gemma-2 chooses sdpa, which leaves out the cap on the scores
    made = Gemma2ForCausalLM(Gemma2Config(**fields, attn_implementation="eager"))
    return spread(made, seed=9)  # type: ignore[return-value]


def inputs(length: int = 9) -> dict[str, torch.Tensor]:
    words = torch.randint(3, 80, (2, length), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([torch.full((2, 5), 88), words], 1)
    return {"input_ids": ids, "pixel_values": images(2)}


def test_a_new_model_is_a_text_only_gemma(tmp_path: Path) -> None:
    """Checkpoints in, and logits of Gemma out, whatever the image shows."""
    paths = []
    for name, source in (("florence", florence()), ("gemma", gemma())):
        source.save_pretrained(tmp_path / name)
        paths.append(str(tmp_path / name))
    model = from_pretrained_parts(*paths)
    assert not model.training
    ids = targets([6, 6])
    got = model(**inputs(), decoder_input_ids=ids).logits
    assert torch.equal(got, gemma()(input_ids=ids).logits)
    # not because the encoder is dead: its states are Florence-2's
    states, _ = model.model.encode(**inputs())
    want = florence()(**inputs(), decoder_input_ids=ids[:, :1]).encoder_last_hidden_state
    assert torch.equal(states.last_hidden_state, want)
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn_gate.fill_(0.5)
    assert not torch.allclose(model(**inputs(), decoder_input_ids=ids).logits, got)


def test_what_is_inserted_starts_as_published() -> None:
    torch.manual_seed(3)
    model = from_pretrained_parts(florence(), gemma(), generator=torch.Generator().manual_seed(5))
    again = from_pretrained_parts(florence(), gemma(), generator=torch.Generator().manual_seed(5))
    source = gemma().model
    rows = []
    for layer, twin, own in zip(
        model.model.decoder.layers, again.model.decoder.layers, source.layers
    ):
        assert layer.encoder_attn_gate.tolist() == [0.0]
        norm = layer.post_encoder_attention_layernorm.weight
        assert torch.equal(norm, own.post_attention_layernorm.weight)
        assert norm.abs().max() > 0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.encoder_attn, name).weight
            assert torch.equal(weight, getattr(twin.encoder_attn, name).weight)
            rows.append(weight.flatten())
    values = torch.cat(rows).detach()
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert values.mean().abs() < 4 * 0.02 / len(values) ** 0.5
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert len({round(float(v), 9) for v in values}) > 0.99 * len(values)


def test_dtype_and_overrides() -> None:
    model = from_pretrained_parts(
        florence(),
        gemma(),
        dtype=torch.bfloat16,
        final_logit_softcapping=None,
        decoder={"query_pre_attn_scalar": 7},
    )
    assert model.model.decoder.layers[0].encoder_attn.scaling == 7**-0.5
    assert model.config.decoder.hidden_size == 64
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.final_logit_softcapping is None
    assert from_pretrained_parts(florence().half(), gemma()).dtype == torch.float16


def tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """Splits into the longest words it knows (as WordPiece does, without its mark)."""
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    core = Tokenizer(
        models.WordPiece(vocabulary, unk_token=special["unk_token"], continuing_subword_prefix="")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


FLORENCE_SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
GEMMA_SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def florence_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(["_", "a", "b", "c", "ab", "_ab", "d"], **FLORENCE_SPECIAL)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(["ab", "abc", "\u2581abd", "dd", "\u2581"], **GEMMA_SPECIAL)


def test_a_row_is_the_mean_of_its_pieces() -> None:
    ours, theirs = gemma_tokenizer(), florence_tokenizer()
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    table = remapped_embedding(
        weight, theirs, ours, 4000, generator=torch.Generator().manual_seed(2)
    )
    assert table.shape == (4000, 8)

    def row(*pieces: str) -> torch.Tensor:
        return weight[theirs.convert_tokens_to_ids(list(pieces))].mean(0)

    ids = ours.convert_tokens_to_ids
    expected = {
        ids("ab"): row("ab"),
        ids("abc"): row("ab", "c"),
        ids("\u2581abd"): row("_ab", "d"),
        ids("dd"): row("d", "d"),
        ids("\u2581"): row("_"),
        0: row("<pad>"),
        1: row("</s>"),
        2: row("<s>"),
        3: row("<unk>"),
    }
    for index, want in expected.items():
        assert torch.allclose(table[index], want), ours.convert_ids_to_tokens(index)
    # the mask token has a counterpart, but is none of the four: random, as the rows beyond
    assert not torch.allclose(table[4], row("<mask>"), atol=0.1)
    rest = torch.cat([table[4:5], table[len(ours) :]])
    assert rest.std() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match=r"vocab_size must be at least len\(gemma_tokenizer\), 10"):
        remapped_embedding(weight, theirs, ours, 9)


def test_a_florence_decoder_with_another_vocabulary() -> None:
    source = florence()
    model = from_pretrained_parts(
        source,
        florence_tokenizer=florence_tokenizer(),
        gemma_tokenizer=gemma_tokenizer(),
        vocab_size=64,
    )
    assert model.config.decoder.vocab_size == 64
    assert (model.config.pad_token_id, model.config.decoder_start_token_id) == (0, 1)
    counts = parameter_counts(model)
    assert counts["embedding"] == 64 * 32
    shared = source.model.language_model.shared.weight
    ab = florence_tokenizer().convert_tokens_to_ids("ab")
    assert torch.equal(model.model.decoder.embed_tokens.weight[5], shared[ab])
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    # the same words through either vocabulary: the same states (and Florence-2 has no softcap)
    ids, theirs = torch.tensor([[1, 2, 5]]).expand(2, 3), torch.tensor([[2, 0, ab]]).expand(2, 3)
    got = model.model(**inputs(), decoder_input_ids=ids).last_hidden_state
    want = source.model(**inputs(), decoder_input_ids=theirs).last_hidden_state
    assert torch.allclose(got, want, atol=1e-5)
    logits = model(**inputs(), decoder_input_ids=ids).logits[..., 5]
    raw = source(**inputs(), decoder_input_ids=theirs).logits[..., ab]
    assert torch.allclose(logits, 30 * torch.tanh(raw / 30), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"florence": 3}, "florence must be a Florence2ForConditionalGeneration, or a path"),
        ({"gemma": "florence"}, "gemma must be a Gemma2ForCausalLM, or a path"),
        ({"gemma": None}, "florence_tokenizer must be given where gemma is None; got None"),
        (
            {"gemma": None, "florence_tokenizer": "given"},
            "gemma_tokenizer must be given where gemma is None; got None",
        ),
    ],
)
def test_refusals_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"florence": florence(), "gemma": gemma(), **arguments}
    if given["gemma"] == "florence":
        given["gemma"] = BartForConditionalGeneration(config("0.4B").encoder)
    with pytest.raises(ValueError, match=message):
        from_pretrained_parts(**given)
