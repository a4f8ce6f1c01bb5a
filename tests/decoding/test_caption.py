"""fastvlm.caption gives what one generate() for each image and language gives."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from speakers import LANGUAGE_CODES, PREFIXES, TOPIC, Speaker, pixels
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

import fastvlm
from fastvlm.compat import versions
from fastvlm.decoding import prefixes
from fastvlm.decoding.languages import LANGUAGES
from fastvlm.run.step import STEPS

ENDS = "those of the speaker"
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-ended": {"eos_token_id": ENDS},
    "greedy-penalties": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.7},
    "beams": {"num_beams": 3},
    "beams-length-penalty": {"num_beams": 3, "eos_token_id": ENDS, "length_penalty": 0.4},
    "beams-early-ended": {"num_beams": 2, "early_stopping": True, "eos_token_id": ENDS},
    "beams-all": {"num_beams": 3, "num_return_sequences": 3, "no_repeat_ngram_size": 2},
    "no-cache": {"num_beams": 2, "use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "least": {"min_length": 7, "eos_token_id": ENDS},
}


def prefix_of(code: str) -> str:
    return PREFIXES[code] if code in PREFIXES else LANGUAGES[code].prefix


def caption(told: Speaker, images: Any, languages: Any = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"max_new_tokens": 9, "prefixes": PREFIXES, "prompt": TOPIC}
    return fastvlm.caption(
        told.model,
        told.processor,
        images,
        LANGUAGE_CODES if languages is None else languages,
        tokenizer=told.tokenizer,
        **{**defaults, **settings},
    )


def cut(tokens: Tensor, ends: list[int] | int) -> list[int]:
    """Up to the first end token, which stays."""
    ends = [ends] if isinstance(ends, int) else ends
    ids = tokens.tolist()
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def alone(
    plain: Speaker, image: Tensor, prompt: str, code: str, row: int = 0, **settings: Any
) -> tuple[list[int], float]:
    """Tokens and score that generate() by itself gives one image in one language."""
    prefix = prefix_of(code)
    want = plain.alone(image, prompt, prefix, max_new_tokens=9, **settings)
    ends = settings.get("eos_token_id", plain.model.generation_config.eos_token_id)
    tokens = cut(want.sequences[row, len(plain.begun(prefix)) :], ends)
    if settings.get("num_beams"):
        return tokens, float(want.sequences_scores[row])
    steps = plain.model.compute_transition_scores(
        want.sequences, want.scores, normalize_logits=True
    )
    return tokens, float(steps[0, : len(tokens)].mean())


@pytest.mark.turns(2)
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_scores_are_those_of_separate_calls(
    told: Speaker, plain: Speaker, case: str
) -> None:
    settings = dict(CASES[case])
    if "eos_token_id" in settings:
        settings["eos_token_id"] = plain.ends
    images = pixels(2)
    captions = caption(told, images, **settings)
    ranks = settings.get("num_return_sequences", 1)
    order = [(c.image, c.language) for c in captions]
    assert order == [(i, code) for i in (0, 1) for code in LANGUAGE_CODES for _ in range(ranks)]
    for index, got in enumerate(captions):
        row = index % ranks
        tokens, score = alone(plain, images[got.image], TOPIC, got.language, row, **settings)
        assert list(got.tokens) == tokens
        assert got.score == pytest.approx(score, rel=1e-3, abs=1e-4)
    # the comparison says something: languages and images differ, and some rows end before others
    assert len({c.tokens for c in captions}) > 2
    scores = [[c.score for c in captions if c.image == image] for image in (0, 1)]
    assert any(abs(a - b) > 2e-2 for a, b in zip(*scores))
    if "ended" in case:
        assert len({len(c.tokens) for c in captions}) > 1


def test_sampling_repeats_with_its_seed_and_leaves_the_random_state(told: Speaker) -> None:
    settings = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.3}
    state = torch.get_rng_state()
    first = caption(told, pixels(1), seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    again = caption(told, pixels(1), seed=3, **settings)
    other = caption(told, pixels(1), seed=4, **settings)
    assert len(first) == 2 * len(LANGUAGE_CODES)
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.tokens for c in first] != [c.tokens for c in other]
    assert first[0].tokens != first[1].tokens


def test_patched_samples_as_plain(plain: Speaker) -> None:
    settings = {"do_sample": True, "seed": 5, "num_return_sequences": 2}
    want = caption(plain, pixels(2), **settings)
    with fastvlm.patched(plain.model):
        got = caption(plain, pixels(2), **settings)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    for ours, theirs in zip(got, want):
        assert ours.score == pytest.approx(theirs.score, rel=1e-3, abs=1e-4)


def test_padded_rows_take_the_planned_step(plain: Speaker) -> None:
    """What counts a row's positions is no hook of a stranger, for which modules must be called."""
    kept: list[Any] = []
    plain.model.register_forward_hook(lambda _, args, out: kept.append(out.past_key_values))
    with fastvlm.patched(plain.model):
        caption(plain, pixels(1), ["en", "zh"], num_beams=2)
        assert all(plan is not None for plan in STEPS[kept[-1]].values())
        table = prefixes.decoder_stack(plain.model)._modules.get("embed_positions")
        if table is not None:
            table.register_forward_hook(lambda *_: None)
            caption(plain, pixels(1), ["en", "zh"], num_beams=2)
            assert not any(STEPS[kept[-1]].values())


def test_one_generate_for_all_prefixes(told: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = told.model.generate
    monkeypatch.setattr(
        told.model, "generate", lambda **kw: calls.append(kw["input_ids"].shape[0]) or real(**kw)
    )
    together = caption(told, pixels(2))
    assert calls == [8]
    calls.clear()
    # a family whose positions nobody knows how to count: as few calls as lengths
    monkeypatch.setattr("fastvlm.decoding.writer.may_pad", lambda model: False)
    grouped = caption(told, pixels(2))
    assert sorted(calls) == [4, 4]
    assert [c.tokens for c in grouped] == [c.tokens for c in together]


def test_a_row_of_the_start_token_alone_is_not_padded(
    plain: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.words.bos_token = None
    real, begun = plain.model.generate, []
    monkeypatch.setattr(
        plain.model,
        "generate",
        lambda **kw: begun.append(kw["decoder_input_ids"].tolist()) or real(**kw),
    )
    caption(plain, pixels(1), ["zh", "en"], prefixes={"zh": ""})
    start = plain.model.generation_config.decoder_start_token_id
    assert begun[0] == [[start]]
    assert [len(row) for row in begun[1]] == [4]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_scores_of_the_vocabulary_are_not_kept(plain: Speaker, settings: dict[str, Any]) -> None:
    held: list[int] = []

    def look(input_ids: Tensor, scores: Any) -> Tensor:
        held.append(sum(step.numel() for step in scores))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    caption(plain, pixels(1), ["en"], stopping_criteria=[look], **settings)
    assert len(held) > 3
    assert set(held) == {settings.get("num_beams", 1) * plain.model.lm_head.out_features}


def test_positions_are_counted_from_the_row_only_inside(told: Speaker) -> None:
    before = caption(told, pixels(1), ["zh"])
    caption(told, pixels(1))
    assert [c.tokens for c in caption(told, pixels(1), ["zh"])] == [c.tokens for c in before]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in told.model.modules())


def test_an_error_leaves_the_model_usable(told: Speaker) -> None:
    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("mine")

    want = caption(told, pixels(1))
    with pytest.raises(RuntimeError, match="mine"):
        caption(told, pixels(1), logits_processor=[broken])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in told.model.modules())
    assert [c.tokens for c in caption(told, pixels(1))] == [c.tokens for c in want]


def test_threads_do_not_see_each_others_positions(told: Speaker) -> None:
    """Two pad, one does not; they take turns at every step."""
    spoken = [("en", "zh"), ("zh",), ("zh", "zh", "de")]
    want = [caption(told, pixels(2), list(codes), min_new_tokens=9) for codes in spoken]
    turn = threading.Barrier(len(spoken))
    got: dict[int, Any] = {}

    def pause(input_ids: Tensor, scores: Tensor) -> Tensor:
        turn.wait(timeout=30)
        return scores

    def run(index: int) -> None:
        settings = {"min_new_tokens": 9, "logits_processor": [pause]}
        got[index] = caption(told, pixels(2), list(spoken[index]), **settings)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(spoken))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, captions in enumerate(want):
        assert [c.tokens for c in got[index]] == [c.tokens for c in captions]


def test_captions_within_captions(told: Speaker) -> None:
    """A logits processor that captions with the same model: the inner rows count for themselves."""
    want = caption(told, pixels(1), ["zh", "en", "en"])
    inner: list[Any] = []

    def asks(input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(inner) < 2:
            inner.append(None)
            inner[-1] = caption(told, pixels(1), ["zh", "en", "en"])
        return scores

    outer = caption(told, pixels(1), ["en", "zh"], logits_processor=[asks])
    alone = caption(told, pixels(1), ["en", "zh"])
    assert [c.tokens for c in outer] == [c.tokens for c in alone]
    for captions in inner:
        assert [c.tokens for c in captions] == [c.tokens for c in want]


def test_the_prefix_is_cut_or_kept_and_text_begins_upper_case(told: Speaker) -> None:
    cut_off = caption(told, pixels(1), ["de", "xx"])
    kept = caption(told, pixels(1), ["de", "xx"], keep_prefix=True)
    assert [c.tokens for c in cut_off] == [c.tokens for c in kept]
    special = set(told.words.all_special_tokens)
    for short, long, prefix in zip(cut_off, kept, ("Das Bild zeigt", "Photo")):
        words = told.words.convert_ids_to_tokens(short.tokens)
        words = [word for word in words if word not in special]
        text = " ".join(words)
        assert short.text == text[:1].upper() + text[1:]
        assert long.text == f"{prefix} {text}"


def test_no_prefix(told: Speaker, plain: Speaker) -> None:
    """An empty prefix beside a long one: the row begins with start and bos alone."""
    got = caption(told, pixels(1), ["en", "de"], prefixes={"de": ""})[1]
    want = plain.alone(pixels(1)[0], TOPIC, "", max_new_tokens=9)
    eos = plain.model.generation_config.eos_token_id
    assert list(got.tokens) == cut(want.sequences[0, 2:], eos)


def test_a_generation_config_serves_as_arguments_do(told: Speaker) -> None:
    settings = {"num_beams": 2, "length_penalty": 0.5, "eos_token_id": told.ends}
    config = GenerationConfig(**settings)
    got = caption(told, pixels(1), generation_config=config)
    want = caption(told, pixels(1), **settings)
    assert got == want
    assert config.max_new_tokens is None


def test_stop_strings_end_a_row_alone(told: Speaker) -> None:
    """What is written behind the end of a row is filler, and no part of its tokens or score."""
    free = caption(told, pixels(1), ["en", "zh"])
    word = told.words.decode([free[0].tokens[2]])
    stopped = caption(told, pixels(1), ["en", "zh"], stop_strings=[word])
    first = free[0].tokens.index(free[0].tokens[2])
    assert stopped[0].tokens == free[0].tokens[: first + 1]


@pytest.mark.parametrize("penalty", [None, 0.0, 1.5, -1.0])
def test_a_caption_of_no_tokens_has_the_score_0(told: Speaker, penalty: float | None) -> None:
    """Padding that the caller's own rule wrote, and stopped."""

    class Silent(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return (ids[:, -2:] == pad).all(1)

    pad = told.model.generation_config.pad_token_id
    wish = {"prefix_allowed_tokens_fn": lambda row, ids: [pad], "forced_bos_token_id": None}
    if penalty is not None:
        wish["length_penalty"] = penalty
    found = caption(told, pixels(1), stopping_criteria=[Silent()], **wish)
    assert [(c.tokens, c.score) for c in found] == [((), 0.0)] * len(found)


def test_no_padding_where_prefixes_are_equally_long(
    told: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of the decoder would take it off the faster path for nothing."""
    real, masks = told.model.generate, []

    def generate(**kwargs: Any) -> Any:
        masks.append(kwargs.get("decoder_attention_mask"))
        return real(**kwargs)

    monkeypatch.setattr(told.model, "generate", generate)
    caption(told, pixels(1), ["en", "de"])
    caption(told, pixels(1), ["en", "zh"])
    assert masks[0] is None
    assert masks[1].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]


def test_decoders_without_known_positions_are_not_padded(plain: Speaker) -> None:
    assert prefixes.may_pad(plain.model)
    stack = prefixes.decoder_stack(plain.model)
    for name in ("embed_positions", "rotary_emb"):
        if hasattr(stack, name):
            setattr(stack, name, torch.nn.Identity())
            delattr(stack, name)
    assert not prefixes.may_pad(plain.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_runs(told: Speaker, dtype: torch.dtype) -> None:
    told.model.to(dtype)
    captions = caption(told, pixels(1), num_beams=2)
    assert len(captions) == len(LANGUAGE_CODES)
    assert all(-20 < one.score < 0 for one in captions)


def test_older_transformers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastvlm.decoding.caption", raising=False)
    monkeypatch.delitem(vars(fastvlm), "caption", raising=False)
    monkeypatch.setattr(versions, "installed", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"caption needs .* 5\.5 or newer, here is 4\.57\.1"):
        _ = fastvlm.caption


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_are_ranked_without_logits(beams: int, told: Speaker, monkeypatch: Any) -> None:
    """Unless a criterion of the caller's looks at the scores, which then are tensors."""
    ranked, seen = [], set()
    rank = fastvlm.ops.linear_topk
    monkeypatch.setattr(
        fastvlm.ops, "linear_topk", lambda *a, **k: [ranked.append(a[2]), rank(*a, **k)][1]
    )

    class Looks(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.add(type(scores[-1]))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    first = caption(told, pixels(1), num_beams=beams)
    is_patched = hasattr(type(told.model), "_fastvlm_base")
    assert bool(ranked) == (is_patched and beams > 1)
    ranked.clear()
    second = caption(told, pixels(1), num_beams=beams, stopping_criteria=[Looks()])
    assert not ranked
    assert seen == {Tensor}
    assert [c.tokens for c in first] == [c.tokens for c in second]
    assert all(abs(a.score - b.score) < 1e-5 for a, b in zip(first, second))
