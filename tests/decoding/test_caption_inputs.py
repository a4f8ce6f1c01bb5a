"""What fastvlm.caption takes as images, prompts and languages, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speakers import (
    IMAGE_TOKENS,
    SIZE,
    TOPIC,
    Speaker,
    florence2_processor,
    picture,
    pixels,
    speaker,
)

import fastvlm
from fastvlm.decoding import encode_once
from fastvlm.decoding.images import to_pixels
from fastvlm.decoding.languages import LANGUAGES, chosen, prompt_texts


def processed(told: Speaker, seed: int) -> torch.Tensor:
    return told.processor.image_processor(images=picture(seed), return_tensors="pt").pixel_values[0]


def test_images_come_in_many_forms(tmp_path: Path) -> None:
    told = speaker("florence2")
    want = torch.stack([processed(told, seed) for seed in (1, 2)])
    take = told.processor.image_processor
    for seed in (1, 2):
        picture(seed).save(tmp_path / f"{seed}.png")
    paths = [str(tmp_path / "1.png"), tmp_path / "2.png"]
    pictures = [picture(1), np.asarray(picture(2))]
    ready = [want[0], want[1].numpy()]
    for images in (paths, pictures, ready, want, want.numpy(), (paths[0], ready[1])):
        assert torch.equal(to_pixels(images, take), want)
    for image in (paths[0], pictures[0], ready[0]):
        assert torch.equal(to_pixels(image, take), want[:1])
    assert to_pixels(picture(1).convert("L"), take).shape == (1, 3, SIZE, SIZE)


def test_an_iterable_is_read_as_its_captions_are_asked_for() -> None:
    told = speaker("florence2")
    taken: list[int] = []

    def pictures() -> Any:
        for seed in range(100):
            taken.append(seed)
            yield picture(seed)
        raise AssertionError("nobody asked for so many")

    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    stream = fastvlm.caption(
        told.model, told.processor, pictures(), ["en", "de"], batch_size=2, **settings
    )
    assert taken == []
    got = [next(stream) for _ in range(10)]
    assert taken == [0, 1, 2, 3, 4, 5]
    want = fastvlm.caption(
        told.model, told.processor, [picture(seed) for seed in range(5)], ["en", "de"], **settings
    )
    assert [(c.image, c.language, c.tokens) for c in got] == [
        (c.image, c.language, c.tokens) for c in want
    ]
    # what is refused of the arguments is refused at once, a picture when it is reached
    with pytest.raises(ValueError, match="languages must be one code"):
        fastvlm.caption(told.model, told.processor, iter([1]), [])
    stream = fastvlm.caption(
        told.model, told.processor, iter([picture(1), "no.png"]), ["en"], batch_size=1, **settings
    )
    assert next(stream).image == 0
    with pytest.raises(ValueError, match=r"images\[1\] must be an image that can be read"):
        next(stream)
    assert list(fastvlm.caption(told.model, told.processor, iter([]), ["en"])) == []
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        fastvlm.caption(told.model, told.processor, iter([]), ["en"], batch_size=0)


def test_prompts_are_those_of_florence2s_processor() -> None:
    """Ids and states, task token and text, two prompts of different lengths."""
    told, real = speaker("florence2"), florence2_processor()
    generate, calls = told.model.generate, []
    told.model.generate = lambda **kwargs: calls.append(kwargs) or generate(**kwargs)
    for prompt in ("<CAPTION>", "<MORE_DETAILED_CAPTION>", "Describe the image"):
        want = real(text=prompt, images=picture(1), return_tensors="pt")
        fastvlm.caption(told.model, real, picture(1), ["en"], prompt=prompt, max_new_tokens=1)
        assert torch.equal(calls[-1]["input_ids"], want["input_ids"])
        states = told.model.model.language_model.encoder(
            inputs_embeds=embedded(told.model, want), attention_mask=want["attention_mask"]
        )[0]
        assert torch.allclose(calls[-1]["encoder_outputs"][0], states, atol=1e-6)


def embedded(model: Any, inputs: Any) -> torch.Tensor:
    words = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    where = model.get_placeholder_mask(inputs["input_ids"], words, features)
    return words.masked_scatter(where, features)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_encode_once_pads_prompts_and_keeps_their_states(patched: bool) -> None:
    told = speaker("florenz-gemma")
    if patched:
        fastvlm.patch(told.model)
    both = encode_once(told.model, pixels(2), [[5, 6, 7, 8], [9, 10]])
    assert both.states.shape == (4, IMAGE_TOKENS + 4, 32)
    assert (both.num_images, both.num_prompts) == (2, 2)
    assert both.mask.sum(1).tolist() == [IMAGE_TOKENS + 4, IMAGE_TOKENS + 2] * 2
    for image in (0, 1):
        alone = encode_once(told.model, pixels(2)[image : image + 1], [[9, 10]])
        row = both.states[2 * image + 1, : IMAGE_TOKENS + 2]
        assert torch.allclose(row, alone.states[0], atol=1e-5)
        assert torch.equal(both.input_ids[2 * image + 1, : IMAGE_TOKENS + 2], alone.input_ids[0])
    assert not both.states.requires_grad


def test_encode_once_refuses_by_name() -> None:
    told = speaker("florence2")
    with pytest.raises(ValueError, match=r"encode_once: pixel_values must be .*\[3, 64, 64\]"):
        encode_once(told.model, pixels(1)[0], [[5]])
    for prompts in ([], [[5], []]):
        with pytest.raises(ValueError, match="encode_once: prompts must be one sequence"):
            encode_once(told.model, pixels(1), prompts)


def test_the_languages_of_the_paper() -> None:
    assert list(LANGUAGES) == ["en", "de", "fr", "es", "ru", "zh"]
    fr, xx = chosen(["fr", "xx"], {"xx": "Mi montras", "de": "nie"})
    assert (fr.name, fr.prefix) == ("French", "La photo montre")
    assert (xx.code, xx.name, xx.prefix) == ("xx", "", "Mi montras")
    assert chosen(["de"], {"de": ""})[0] == type(fr)("de", "German", "")


def test_prompts_of_languages() -> None:
    pair = chosen(["fr", "zh"], None)
    assert prompt_texts(pair, "<CAPTION>", False) == [TOPIC, TOPIC]
    named = [f"The target language is {name}. {TOPIC}" for name in ("French", "simplified Chinese")]
    assert prompt_texts(pair, "<CAPTION>", True) == named
    assert prompt_texts(pair, "in {language} {x}", True) == [
        "in French {x}",
        "in simplified Chinese {x}",
    ]
    assert prompt_texts(pair, {"fr": "a", "zh": "<CAPTION>"}, True) == ["a", named[1]]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-language": ({"languages": []}, ValueError, "languages must be one code or more"),
    "text": ({"languages": "en"}, TypeError, r"languages must be a list of codes.*'en'"),
    "unknown": ({"languages": ["en", "xx"]}, ValueError, "languages must be of en, .*'xx'"),
    "not-a-code": ({"languages": [3]}, ValueError, "languages must be of en, .*got 3"),
    "prefixes": ({"prefixes": {"en": 3}}, ValueError, "prefixes must be a mapping"),
    "prompt": ({"prompt": 3}, ValueError, "prompt must be text, or a mapping"),
    "prompt-missing": ({"prompt": {"de": "a"}}, ValueError, "prompt must be text for 'en' too"),
    "nameless": (
        {"languages": ["xx"], "prefixes": {"xx": "photo"}, "prompt": "in {language}"},
        ValueError,
        "prompt must be given for 'xx'",
    ),
    "no-image": ({"images": []}, ValueError, "images must be one image or more"),
    "no-file": ({"images": "no.png"}, ValueError, r"images\[0\] must be .*'no.png' \(No such file"),
    "no-picture": ({"images": __file__}, ValueError, r"images\[0\] must be an image that can be"),
    "ints": (
        {"images": torch.zeros(3, 8, 8, dtype=torch.int64)},
        ValueError,
        r"images\[0\] must be a path.* got a int64 tensor",
    ),
    "gray": (
        {"images": np.zeros((8, 8), np.uint8)},
        ValueError,
        r"images\[0\] must be a path.* shape \[8, 8\]",
    ),
    "nothing": ({"images": [None]}, ValueError, r"images\[0\] must be a path"),
    "sizes": (
        {"images": [torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)]},
        ValueError,
        r"images\[1\] must be of the size of images\[0\], \[3, 64, 64\]",
    ),
    "tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number, 1"),
    "beams": ({"num_beams": 1.5}, ValueError, "num_beams must be a whole number, 1"),
    "length": ({"max_length": 20}, ValueError, r"max_length must be left out"),
    "states": ({"encoder_outputs": (1,)}, ValueError, "encoder_outputs must be left out"),
    "model": ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be a Florence-2 or Florenz"),
    "processor": ({"processor": None}, ValueError, "processor must be one with a tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str) -> None:
    given, kind, message = REFUSED[case]
    told = speaker("florence2")
    arguments = {
        "model": told.model,
        "processor": told.processor,
        "images": pixels(1),
        "languages": ["en"],
        **given,
    }
    with pytest.raises(kind, match=rf"fastvlm\.caption: {message}"):
        fastvlm.caption(**arguments)


def test_florenz_needs_the_tokenizer_of_its_captions() -> None:
    told = speaker("florenz-bart")
    with pytest.raises(ValueError, match=r"caption: tokenizer must be given"):
        fastvlm.caption(told.model, told.processor, pixels(1), ["en"])


def test_pictures_need_an_image_processor_and_pixel_values_do_not() -> None:
    told = speaker("florence2")
    told.processor.image_processor = None
    with pytest.raises(ValueError, match=r"processor must be one with an image_processor"):
        fastvlm.caption(told.model, told.processor, picture(1), ["en"])
    assert fastvlm.caption(told.model, told.processor, pixels(1), ["en"], max_new_tokens=2)
