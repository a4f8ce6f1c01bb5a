"""One Gemma layer with inserted cross-attention against the formulas of the paper's section 1."""

from __future__ import annotations

import torch
from small import build
from torch import Tensor, nn


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    w = norm.weight.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w)


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    assert module.bias is None
    return x @ module.weight.double().T


def rotated(x: Tensor) -> Tensor:
    """x [B, L, H, D]: pairs (i, i + D/2) turn by position * 10000^(-2i/D)."""
    length, dim = x.shape[1], x.shape[3]
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
    z = z * torch.polar(torch.ones_like(angle), angle)[None, :, None, :]
    return torch.cat([z.real, z.imag], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, cap: float) -> Tensor:
    """q [B, L, H, D], k, v [B, K, Hkv, D], hidden bool [B, L, K] -> [B, L, H * D]."""
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        keys, values = k[:, :, head // group], v[:, :, head // group]
        scores = cap * torch.tanh(q[:, :, head] @ keys.mT * scale / cap)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, :, head] = weights @ values
    return out.flatten(2)


def test_a_layer_is_what_the_paper_says() -> None:
    model = build("3.5B")
    config = model.config.decoder
    layer = model.model.decoder.layers[1]  # no sliding window
    assert layer.encoder_attn.k_proj.in_features == model.config.encoder.d_model != 64
    generator = torch.Generator().manual_seed(7)
    batch, length, keys, dim = 2, 7, 9, config.head_dim
    h = torch.randn(batch, length, config.hidden_size, generator=generator).double()
    states = torch.randn(batch, keys, 32, generator=generator).double()
    mask = torch.ones(batch, keys).bool()
    mask[1, 4:] = False

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    scale, cap = dim**-0.5, config.attn_logit_softcapping
    future = torch.ones(length, length).bool().triu(1).expand(batch, -1, -1)
    x = rms(h, layer.input_layernorm)
    a = layer.self_attn
    q, k, v = (heads(linear(x, m)) for m in (a.q_proj, a.k_proj, a.v_proj))
    y = attention(rotated(q), rotated(k), v, future, scale, cap)
    want = h + rms(linear(y, a.o_proj), layer.post_attention_layernorm)
    a = layer.encoder_attn
    q, k, v = (
        heads(linear(want, a.q_proj)),
        *(heads(linear(states, m)) for m in (a.k_proj, a.v_proj)),
    )
    y = attention(q, k, v, ~mask[:, None].expand(-1, length, -1), scale, cap)
    gate = torch.tanh(layer.encoder_attn_gate.double())
    assert gate.abs() > 0.05
    want = want + gate * rms(linear(y, a.o_proj), layer.post_encoder_attention_layernorm)
    x = rms(want, layer.pre_feedforward_layernorm)
    x = nn.functional.gelu(linear(x, layer.mlp.gate_proj), approximate="tanh") * linear(
        x, layer.mlp.up_proj
    )
    want = want + rms(linear(x, layer.mlp.down_proj), layer.post_feedforward_layernorm)

    # the stack makes the masks and the RoPE tables; one layer, and no norm after it
    decoder = model.model.decoder
    decoder.layers = nn.ModuleList([layer])
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    decoder.norm = nn.Identity()
    got = decoder(
        inputs_embeds=h.float(),
        encoder_hidden_states=states.float(),
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_names_and_kinds_of_the_inserted_parameters() -> None:
    layer = build("3.5B").model.decoder.layers[0]
    inserted = {n: tuple(p.shape) for n, p in layer.named_parameters() if "enc" in n}
    assert inserted == {
        "encoder_attn_gate": (1,),
        "encoder_attn.q_proj.weight": (64, 64),
        "encoder_attn.k_proj.weight": (32, 32),
        "encoder_attn.v_proj.weight": (32, 32),
        "encoder_attn.o_proj.weight": (64, 64),
        "post_encoder_attention_layernorm.weight": (64,),
    }


def test_a_new_gate_is_closed_and_learns() -> None:
    """At gate 0 nothing of the encoder is seen; the gate itself gets a gradient, q does not."""
    model = build("3.5B")
    decoder = model.model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            layer.encoder_attn_gate.zero_()
    ids = torch.randint(3, 90, (2, 5))
    states = torch.randn(2, 9, 32)
    alone = decoder(input_ids=ids).last_hidden_state
    read = decoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    assert torch.equal(alone, read)
    read.square().sum().backward()
    for layer in decoder.layers:
        assert layer.encoder_attn_gate.grad.abs() > 0
        assert layer.encoder_attn.q_proj.weight.grad.abs().max() == 0


def test_a_random_model_starts_with_closed_gates() -> None:
    from small import config

    from fastvlm.florenz import FlorenzForConditionalGeneration

    model = FlorenzForConditionalGeneration(config("3.5B"))
    for layer in model.model.decoder.layers:
        assert layer.encoder_attn_gate.tolist() == [0.0]
        assert (layer.post_encoder_attention_layernorm.weight == 0).all()
