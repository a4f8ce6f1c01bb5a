"""What captions of one image share: the vision tower, the encoder, keys and values."""

from __future__ import annotations

from typing import Any

import pytest
from speakers import IMAGE_TOKENS, LANGUAGE_CODES, TOPIC, Speaker, pixels
from test_caption import alone, caption

import fastvlm
from fastvlm.decoding.languages import LANGUAGES


def rows_seen(told: Speaker) -> tuple[list[int], list[int]]:
    """Batch sizes that the vision tower and the text encoder will have been called with."""
    tower: list[int] = []
    encoder: list[int] = []
    model = told.model
    model.model.vision_tower.convs[0].register_forward_pre_hook(
        lambda _, args: tower.append(args[0].shape[0])
    )
    model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: encoder.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    return tower, encoder


def test_one_prompt_is_encoded_once(told: Speaker) -> None:
    tower, encoder = rows_seen(told)
    caption(told, pixels(2), num_beams=2)
    assert (tower, encoder) == ([2], [2])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_each_distinct_prompt_is_encoded_once(
    told: Speaker, plain: Speaker, settings: dict[str, Any]
) -> None:
    """Two languages share a prompt, two have one each: unequal groups of readers."""
    target = "The target language is German. " + TOPIC
    prompt = {"en": "<CAPTION>", "de": target, "zh": "What is shown", "xx": TOPIC}
    if told.tokenizer is not None:  # Florenz's task tokens name the target language
        prompt["en"] = TOPIC
    tower, encoder = rows_seen(told)
    captions = caption(told, pixels(2), prompt=prompt, **settings)
    assert (tower, encoder) == ([2], [6])
    prompt["en"] = TOPIC
    for got in captions:
        image = pixels(2)[got.image]
        tokens, score = alone(plain, image, prompt[got.language], got.language, **settings)
        assert list(got.tokens) == tokens
        assert got.score == pytest.approx(score, rel=1e-3, abs=1e-4)
    same = caption(told, pixels(2), **settings)
    assert max(abs(a.score - b.score) for a, b in zip(captions, same)) > 2e-2


def cross_bytes(told: Speaker, **settings: Any) -> int:
    kept: list[Any] = []
    handle = told.model.register_forward_hook(lambda _, args, out: kept.append(out.past_key_values))
    caption(told, pixels(2), **settings)
    handle.remove()
    total = 0
    for layer in kept[-1].cross_attention_cache.layers:
        packed = getattr(layer, "packed", None) or (layer.keys, layer.values)
        total += sum(part.numel() * part.element_size() for part in packed)
    return total


def test_the_cross_cache_has_one_copy_of_an_image(plain: Speaker) -> None:
    repeated = cross_bytes(plain, num_beams=3)
    with fastvlm.patched(plain.model):
        shared = cross_bytes(plain, num_beams=3)
    assert shared * len(LANGUAGE_CODES) * 3 == repeated
    longest = IMAGE_TOKENS + len(TOPIC.split()) + 3  # the prompt with "?", bos and eos
    assert shared % (2 * 2 * longest) == 0


@pytest.mark.parametrize(
    ("prompts", "copies"), [("aabb", 2), ("abab", 2), ("aaab", 4), ("aaaa", 1), ("abcd", 4)]
)
def test_languages_of_a_prompt_share_a_copy(plain: Speaker, prompts: str, copies: int) -> None:
    """Where the prompts have equally many languages; else a copy is repeated for some."""
    words = {"a": "image", "b": "Bild", "c": "photo", "d": "imagen"}
    prompt = {
        code: f"What does the {words[name]} describe?"
        for code, name in zip(LANGUAGE_CODES, prompts)
    }
    with fastvlm.patched(plain.model):
        one = cross_bytes(plain, prompt=TOPIC)
        assert cross_bytes(plain, prompt=prompt) == copies * one


def test_florenz_names_the_target_language(plain: Speaker) -> None:
    """With a task token its prompts are the paper's, one a language; Florence-2's are all one."""
    target = "The target language is {}. " + TOPIC
    named = {code: target.format(LANGUAGES[code].name) for code in ("en", "zh")}
    tower, encoder = rows_seen(plain)
    got = caption(plain, pixels(1), ["en", "zh"], prompt="<CAPTION>")
    florenz = plain.tokenizer is not None
    assert (tower, encoder) == ([1], [2 if florenz else 1])
    want = caption(plain, pixels(1), ["en", "zh"], prompt=named if florenz else TOPIC)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    spelled = caption(
        plain, pixels(1), ["en", "zh"], prompt=f"The target language is {{language}}. {TOPIC}"
    )
    assert ([c.tokens for c in got] == [c.tokens for c in spelled]) == florenz
