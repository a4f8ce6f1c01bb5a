"""The vision tower: attention that leaves its padding out gives what transformers computes with it.

The oracle is transformers' own module in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers as tf
from error_rule import BACKWARD, FORWARD, check
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.florence2 import modeling_florence2 as florence2

import fastvlm
from fastvlm.patching import davit
from fastvlm.patching.patch import PatchError, is_patched

# (window, height, width): whole windows, an edge on either side, on both, and less than a window
SIZES = [(4, 8, 8), (4, 7, 7), (4, 8, 6), (4, 5, 12), (4, 3, 2), (4, 1, 1), (12, 14, 14), (3, 2, 7)]
AT_224 = {56: (128, 4), 28: (256, 8), 14: (512, 16), 7: (1024, 32)}


def configuration(dim: int, heads: int, **settings: Any) -> tf.Florence2VisionConfig:
    config = tf.Florence2VisionConfig(
        embed_dim=[dim], num_heads=[heads], num_groups=[heads], depths=[1], **settings
    )
    config._attn_implementation = "sdpa"
    return config


def spread(module: nn.Module) -> nn.Module:
    """Weights for which attention is far from uniform and the padding far from nothing."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5)
    return module


class Alone(nn.Module):
    """One attention module where the patch looks for it."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def windows(dim: int = 16, heads: int = 2, window: int = 4, bias: bool = True) -> nn.Module:
    config = configuration(dim, heads, window_size=window, qkv_bias=bias)
    return spread(florence2.Florence2VisionWindowAttention(config, 0))


def channels(dim: int = 16, heads: int = 2) -> nn.Module:
    config = configuration(dim, heads)
    return spread(florence2.Florence2VisionChannelAttention(config, 0))


def mlp(dim: int = 16) -> nn.Module:
    return spread(florence2.Florence2VisionMLP(configuration(dim, 2), 0))


def patched(module: nn.Module, **settings: Any) -> nn.Module:
    """A patched copy."""
    module = copy.deepcopy(module)
    fastvlm.patch(Alone(window_attn=module), **settings)
    assert is_patched(module)
    return module


def run(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = module(x)
    out.backward(grad.to(out.dtype))
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def compare(module: nn.Module, x: Tensor, dtype: torch.dtype, ours: Any = None) -> None:
    """ours (default: a patched copy) against transformers' module, exact and in dtype."""
    module, x = module.to(dtype), x.to(dtype)
    grad = torch.randn_like(module(x))
    exact = run(copy.deepcopy(module).double(), x.double(), grad.double())
    plain = run(module, x, grad)
    got = run(patched(module) if ours is None else ours, x, grad)
    assert got.keys() == plain.keys()
    for name, value in got.items():
        factor = FORWARD if name == "out" else BACKWARD
        check(name, value, plain[name], exact[name], factor)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_window_attention(size: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    window, height, width = size
    compare(windows(window=window, bias=bias), torch.randn(3, height, width, 16), dtype)


@pytest.mark.parametrize("side", AT_224)
def test_window_attention_at_true_widths(side: int) -> None:
    dim, heads = AT_224[side]
    compare(windows(dim, heads, 12), torch.randn(1, side, side, dim), torch.float32)


@pytest.mark.parametrize("shape", [(1, 900, 16), (3, 20, 16), (2, 1, 16)], ids=str)
def test_channel_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(channels(), torch.randn(shape), dtype)


def test_mlp(dtype: torch.dtype) -> None:
    compare(mlp(), torch.randn(2, 9, 16), dtype)


@pytest.mark.parametrize("build", [windows, channels])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(build: Callable[[], nn.Module], low: torch.dtype) -> None:
    module = build()
    x = torch.randn(2, 7, 6, 16) if build is windows else torch.randn(2, 42, 16)
    ours = patched(module)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double())
        with torch.autocast("cpu", low):
            check("out", ours(x), module(x), exact, FORWARD)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_wrong_count_is_noticed(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = davit.pad_biases
    monkeypatch.setattr(davit, "pad_biases", lambda count, dtype: right(count + by, dtype))
    with pytest.raises(AssertionError, match="out: off by"):
        compare(windows(), torch.randn(3, 7, 7, 16), torch.float32)


def test_scores_rounded_to_16_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(k.transpose(2, 3), q) * q.shape[2] ** -0.5
        return torch.matmul(v, scores.softmax(2))

    monkeypatch.setattr(davit, "channel_attention", rounded)

    def several() -> None:
        for _ in range(8):  # luck may save one
            compare(channels(), torch.randn(1, 900, 16), torch.bfloat16)

    with pytest.raises(AssertionError, match="off by"):
        several()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pad_keys_add_up_to_their_count(dtype: torch.dtype) -> None:
    """Each bias is a number of the dtype, and all of them stand for the count."""
    for count in range(1, 144):
        biases = davit.pad_biases(count, dtype)
        assert torch.tensor(biases, dtype=dtype).tolist() == biases
        total = sum(map(math.exp, biases))
        assert abs(total - count) <= count * max(torch.finfo(dtype).eps / 16, 2**-50)
        assert len(biases) <= 2


def test_a_hook_on_qkv_or_proj_sees_the_rows_of_padded_windows() -> None:
    """14 x 14 in windows of 12: 576 rows, as without fastvlm, which alone makes 196 and one."""
    module = windows(window=12)
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] = counts.get(name, 0) + inputs[0].numel() // 16

        return hook

    for name in ("qkv", "proj"):
        getattr(module, name).register_forward_pre_hook(count(name))
    x = torch.randn(1, 14, 14, 16)
    module(x)
    assert counts == {"qkv": 576, "proj": 576}
    ours = patched(module)
    counts.clear()
    ours(x)
    assert counts == {"qkv": 576, "proj": 576}


def test_products_of_the_map_only() -> None:
    """FLOPs of a patched module without hooks: qkv and proj of 196 rows, attention of 4 windows."""
    module = patched(windows(window=12), only="attention")
    # plain products, since the counter does not know the kernel that serves on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(torch.randn(1, 14, 14, 16))
    linear = 2 * 196 * 16 * 4 * 16
    keys = {144: 144, 24: 24 + 2, 4: 4 + 2}
    attention = 4 * 16 * sum(n * keys[n] for n in (144, 24, 24, 4))
    assert counter.get_total_flops() == linear + attention


def test_hooks_that_change_the_result_hold_for_the_padding() -> None:
    module = windows()
    module.qkv.register_forward_hook(lambda layer, inputs, out: out.sin() * 2 + 0.3)
    module.proj.register_forward_hook(lambda layer, inputs, out: out.cos())
    compare(module, torch.randn(2, 7, 6, 16), torch.float32)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_qkv_and_proj(when: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj"], init_lora_weights=False)

    def build(patch: bool) -> nn.Module:
        model = models.florence2()
        if patch and when == "before":
            fastvlm.patch(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config).eval()
        if patch and when == "after":
            fastvlm.patch(model)
        return model

    batch = models.FAMILIES["florence2"].training(models.florence2())
    plain, ours = build(False), build(True)
    expected, got = (model(**batch) for model in (plain, ours))
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)
    expected.loss.backward()
    got.loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert any("window_attn.qkv.lora_A" in name for name in wanted)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=1e-4), name


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("pixels", [(64, 64), (60, 44), (128, 96), (200, 36)], ids=str)
def test_tower(pixels: tuple[int, int], images: int) -> None:
    model = models.florence2()
    tower = model.model.vision_tower
    x = torch.randn(images, 3, *pixels)
    with torch.no_grad():
        exact = copy.deepcopy(tower).double()(x.double()).last_hidden_state
        plain = tower(x).last_hidden_state
        fastvlm.patch(model)
        ours = tower(x).last_hidden_state
        check("tower", ours, plain, exact, FORWARD)
        fastvlm.unpatch(model)
        assert torch.equal(tower(x).last_hidden_state, plain)


def test_report_names_what_the_tower_runs_on() -> None:
    model = models.florence2()
    report = fastvlm.patch(model, only="attention")
    entries = {entry.module.removeprefix("model.vision_tower."): entry for entry in report.entries}
    assert entries["blocks.0.0.spatial_block.window_attn"].ops == ("window_attention",)
    assert entries["blocks.3.0.channel_block.channel_attn"].ops == ("channel_attention",)
    assert entries["blocks.0.0.channel_block.ffn"].reason == "not in only: mlp"
    assert not is_patched(model.model.vision_tower.blocks[0][0].channel_block.ffn)
    report = fastvlm.patch(model)
    ops = {entry.module: entry.ops for entry in report.entries}
    assert ops["model.vision_tower.blocks.0.0.channel_block.ffn"] == ("gelu_mlp",)


def test_what_the_tower_keeps_and_why() -> None:
    class Masked(florence2.Florence2VisionWindowAttention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x)

    wider = windows()
    wider.relative_position = nn.Parameter(torch.zeros(7))
    masked = Masked(configuration(16, 2), 0)
    other = mlp()
    other.activation_fn = nn.Tanh()
    model = nn.ModuleList(
        [Alone(window_attn=wider), Alone(window_attn=masked, ffn=other), Alone(window_attn=mlp())]
    )
    report = fastvlm.patch(model)
    reasons = {entry.module: entry.reason for entry in report.skipped}
    assert reasons == {
        "0.window_attn": "it has parts of its own: relative_position",
        "1.window_attn": "its forward has other arguments than hidden_states, or x and size",
        "1.ffn": "its activation Tanh is none that gelu_mlp has",
    }
    with pytest.raises(PatchError, match="parts of its own"):
        fastvlm.patch(Alone(window_attn=wider))


def test_the_published_form_with_x_and_size() -> None:
    """There the map comes as rows beside its size, which is handed through."""

    class SizedWindows(florence2.Florence2VisionWindowAttention):
        def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
            return super().forward(x.unflatten(1, size)), size

    class SizedChannels(florence2.Florence2VisionChannelAttention):
        def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
            return super().forward(x), size

    config = configuration(16, 2, window_size=4)
    x, size = torch.randn(2, 42, 16), (7, 6)
    for kind in (SizedWindows, SizedChannels):
        module = spread(kind(config, 0))
        ours = patched(module)
        out, same = ours(x, size)
        assert same == size
        assert torch.allclose(out, module(x, size)[0], atol=1e-5)


def drops(rate: float) -> nn.Module:
    """A tower whose blocks are dropped at random in training mode."""
    model = models.florence2().train()
    for module in model.modules():
        for name in ("drop_path1", "drop_path2"):
            if hasattr(module, name):
                setattr(module, name, florence2.Florence2DropPath(rate))
    return model


def test_drop_path_draws_as_before() -> None:
    model = drops(0.5)
    tower = model.model.vision_tower
    x = torch.randn(4, 3, 60, 44)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        with torch.no_grad():
            return tower(x).last_hidden_state, torch.rand(3)

    expected, after = run()
    fastvlm.patch(model)
    got, ours_after = run()
    assert torch.equal(ours_after, after)
    assert torch.allclose(got, expected, atol=1e-4)
    torch.manual_seed(12)
    assert not torch.allclose(tower(x).last_hidden_state, expected, atol=1e-2)


def test_a_frozen_tower_keeps_nothing_for_a_backward_pass() -> None:
    model = drops(0.3)
    tower = model.model.vision_tower
    fastvlm.patch(model)
    saved: list[Tensor] = []

    def outputs() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return tower(torch.randn(2, 3, 60, 44)).last_hidden_state

    assert outputs().requires_grad
    assert saved
    saved.clear()
    tower.requires_grad_(False)
    assert not outputs().requires_grad
    assert not saved


@pytest.mark.turns(2)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    module = patched(windows())
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height, width in ((7, 6), (8, 8), (3, 5)):
        x = torch.randn(2, height, width, 16)
        grad = torch.randn(2, height * width, 16)
        expected, got = run(module, x, grad), run(compiled, x, grad)
        for name, value in zip(expected, got.values(), strict=True):
            assert torch.allclose(value, expected[name], atol=1e-5), name


def test_rows_taken_and_put_back_differentiate_twice() -> None:
    order = torch.randperm(6)
    rows, first, second = (
        torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 2, 4)
    )
    taken = davit._Take.apply(rows, order)
    assert torch.equal(davit._Put.apply(order, *taken.split([2, 4])), rows)
    torch.autograd.gradgradcheck(lambda x: davit._Take.apply(x, order) ** 2, (rows,))
    torch.autograd.gradgradcheck(lambda *x: davit._Put.apply(order, *x) ** 2, (first, second))
