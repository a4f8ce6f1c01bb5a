"""What is promised of every family on every transformers from 4.48.1 on (``make matrix``).

Tokens, loss and gradients are those of the unpatched model; on a version whose attention fastvlm
does not know, the report names it.
"""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastvlm
from fastvlm import env
from fastvlm.compat import attentions, hf, versions

OLD = versions.attention_refused()
NUMBERS = versions.parsed(transformers.__version__)
# the transformers that a family came with, where that is not the oldest of all
SINCE = {"t5gemma": (4, 54), "florence2": (4, 56), "paligemma2": (5,), "florenz": (5, 5)}


def gemma2() -> nn.Module:
    # a window as long as the text: 4.48's own cache fails on a shorter one
    return models.gemma2() if NUMBERS >= (5,) else models.gemma2(sliding_window=64)


def donut() -> nn.Module:
    """Swin before an mBART decoder, as Donut has them."""
    torch.manual_seed(0)
    vision = transformers.DonutSwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    text = {**models._text(), "is_decoder": True, "add_cross_attention": True}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, transformers.MBartConfig(**text)
    )
    ids = {"pad_token_id": models.PAD, "eos_token_id": models.EOS, "bos_token_id": 0}
    for name, value in {**ids, "decoder_start_token_id": models.EOS}.items():
        setattr(config, name, value)
    model = transformers.VisionEncoderDecoderModel(config)
    for name, value in {**ids, "decoder_start_token_id": models.EOS}.items():
        setattr(model.generation_config, name, value)
    return models._spread(model, 0.15)


def _donut_inputs(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


FAMILIES = {
    **models.FAMILIES,
    "gemma2": models.Family(gemma2, models._causal_inputs, models._causal_training),
    "t5gemma": models._seq2seq(models.t5gemma),
    "donut": models.Family(
        donut, _donut_inputs, lambda m: models._with_labels(models._seq2seq_inputs(m))
    ),
}
# what stays patched where attention is not
LEFT = {"gemma2": {"linear", "rms_norm", "geglu_mlp"}, "t5gemma": {"linear", "rms_norm"}}


@pytest.fixture(params=sorted(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    since = SINCE.get(request.param, (4, 48, 1))
    if since > NUMBERS:
        pytest.skip(f"{request.param} came with transformers {'.'.join(map(str, since))}")
    return request.param


def _training(name: str, model: nn.Module) -> dict[str, Tensor]:
    batch = FAMILIES[name].training(model)
    if name == "donut":
        return {**_donut_inputs(model), "labels": batch["labels"]}
    return batch


def _tokens(name: str, model: nn.Module) -> list[Tensor]:
    inputs = FAMILIES[name].inputs(model)
    ask = {"max_new_tokens": 10, "min_new_tokens": 10, "no_repeat_ngram_size": 2}
    with torch.no_grad():
        return [model.generate(**inputs, **ask, num_beams=beams) for beams in (1, 3)]


def _step(name: str, model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = _training(name, model)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().double(), grads


def _build(name: str) -> nn.Module:
    return FAMILIES[name].build()


def test_same_tokens_and_nothing_unsaid(name: str) -> None:
    model = _build(name)
    expected = _tokens(name, model)
    assert all(len(set(tokens.flatten().tolist())) > 5 for tokens in expected)  # says something
    report = fastvlm.patch(model)
    for ours, theirs in zip(_tokens(name, model), expected):
        assert torch.equal(ours, theirs)
    ops = {op for entry in report.patched for op in entry.ops}
    if OLD is None:
        assert ops & {"self_attention", "cross_attention"} or name == "paligemma2"
        assert not any("transformers" in (e.reason or "") for e in report.skipped)
    else:
        assert not ops & {"self_attention", "cross_attention", "cached_attention"}
        assert any(entry.reason == OLD for entry in report.skipped)
        assert ops >= LEFT.get(name, {"linear"})
        assert OLD.split(" need")[0] in str(report)
    fastvlm.unpatch(model)
    for ours, theirs in zip(_tokens(name, model), expected):
        assert torch.equal(ours, theirs)


def test_loss_and_gradients_meet_the_error_rule(name: str) -> None:
    with fastvlm.patched(oracle := _build(name).double().train()), fastvlm.use("reference"):
        exact, exact_grads = _step(name, oracle, torch.float64)
    model = _build(name).train()
    theirs, plain = _step(name, model, torch.float32)
    fastvlm.patch(model)
    ours, grads = _step(name, model, torch.float32)
    tiny = torch.finfo(torch.float32).eps
    # of one loss PyTorch's error may be nothing by luck: what it is a mean of is not
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 8 * tiny * exact.abs()
    assert grads.keys() == plain.keys()
    total = torch.stack([g.abs().max() for g in exact_grads.values()]).max()
    for key, want in exact_grads.items():
        mine, other = ((g[key].double() - want).abs().max() for g in (grads, plain))
        assert mine <= 3 * other + tiny * total, key


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("5.99.0", "transformers 5.99.0 is not among the versions tested"),
        ("5.0.0", "left to transformers"),
    ],
)
def test_other_versions_are_named_in_report_and_env(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: Callable[[str], str | None] = versions.installed

    def installed(package: str) -> str | None:
        return version if package == "transformers" else known(package)

    monkeypatch.setattr(versions, "installed", installed)
    model = _build("bart")
    report = fastvlm.patch(model)
    assert any(said in note for note in report.notes)
    assert said in str(report)
    assert said in env.describe()
    refused = [entry for entry in report.skipped if "here is 5.0.0" in (entry.reason or "")]
    assert bool(refused) == (version == "5.0.0")


@pytest.mark.skipif(OLD is not None, reason=str(OLD))
def test_a_stack_that_scales_its_embeddings_itself_decodes_right() -> None:
    """As Gemma-2's did to transformers 5.3, and as a trainer's copy of it still may."""
    model = _build("gemma2")
    stack = model.model

    class Scaling(type(stack)):  # type: ignore[misc]
        def forward(  # type: ignore[no-untyped-def]
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            inputs_embeds=None,
            use_cache=None,
            **kwargs,
        ):
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                **hf.cached(past_key_values),
                inputs_embeds=3 * embeds,
                use_cache=use_cache,
                **kwargs,
            )

        forward = hf.takes_cache(forward)

    stack.__class__ = Scaling
    expected = _tokens("gemma2", model)
    fastvlm.patch(model)
    for ours, theirs in zip(_tokens("gemma2", model), expected):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(OLD is not None, reason=str(OLD))
def test_the_report_says_where_the_own_cache_of_states_is_too_short() -> None:
    report = str(fastvlm.patch(models.t5gemma(sliding_window=7)))
    assert ("more than 7 encoder states" in report) == versions.cross_cache_has_window()
    assert "encoder states" not in str(fastvlm.patch(models.gemma2()))


@pytest.mark.skipif(OLD is not None, reason=str(OLD))
@pytest.mark.parametrize("name", ["gemma2", "t5gemma"])
def test_a_softcap_counts_where_transformers_computes_it(name: str) -> None:
    """To 5.22 these families choose sdpa, which takes the cap and leaves it out."""
    kinds = ("eager", "sdpa") if attentions.sdpa_leaves_out_softcap() else ("eager",)
    found = []
    for attention in kinds:
        model = FAMILIES[name].build()
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = attention
        expected = _tokens(name, model)
        report = fastvlm.patch(model)
        found.append(_tokens(name, model))
        assert all(map(torch.equal, found[-1], expected)), attention
        assert ("attn_logit_softcapping" in str(report)) == (attention == "sdpa")
    assert len(kinds) == 1 or not all(map(torch.equal, *found))  # the cap matters here
