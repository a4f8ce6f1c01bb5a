"""One step of a BART decoder and its tied head as an ONNX graph with a KV cache, for the engines.

The rows are the beams of one image, each with one new token; only the length of the past is
dynamic. What engines do not do by themselves is done here: q, k and v are one product, weights keep
PyTorch's layout ([outputs, inputs], Gemm with transB), which engines pack anew anyway.

Inputs: token [R] and position [1], int64; beam [R], int32, the row of the step before that each row
goes on from; for each layer past_key.N and past_value.N [R, heads, T, D], cross_key.N and
cross_value.N. Outputs: logits [R, vocabulary], present_key.N and present_value.N
[R, heads, T + 1, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engines import IR_VERSION, OPSET

PARTS = ("key", "value")

# How attention is written.
# PRODUCTS: MatMul, Softmax, MatMul; cross-attention's keys once for all beams, [heads, D, S].
# OPERATOR: ONNX Runtime's MultiHeadAttention, which OpenVINO reads, too; in cross-attention the
#   beams are the queries of one image, [1, heads, S, D].
# REPEATED: the same operator, an image's keys and values copied for each beam, [R, heads, S, D], as
#   transformers and optimum have them.
KINDS = PRODUCTS, OPERATOR, REPEATED = "products", "operator", "operator, keys repeated"


class _Graph:
    """Nodes, each named by the tensor that it makes, and weights, which are copied only once."""

    def __init__(self) -> None:
        from onnx import ModelProto

        self.model = ModelProto(ir_version=IR_VERSION)
        self.known: set[str] = set()

    def weight(self, name: str, value: Tensor) -> str:
        from onnx import numpy_helper

        array = value.detach().contiguous().numpy()
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        name = "ints_" + "_".join(map(str, values))
        if name not in self.known:
            self.known.add(name)
            self.weight(name, torch.tensor(values))
        return name

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        from onnx import helper

        made = helper.make_node(kind, inputs, list(outputs), outputs[0], **attributes)
        self.model.graph.node.append(made)
        return outputs[0]

    def linear(self, x: str, name: str, weight: Tensor, bias: Tensor | None) -> str:
        inputs = [x, self.weight(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", bias))
        return self.node("Gemm", inputs, name, transB=1)

    def norm(self, x: str, name: str, module: nn.LayerNorm) -> str:
        weights = [
            self.weight(f"{name}.{kind}", value)
            for kind, value in (("weight", module.weight), ("bias", module.bias))
        ]
        return self.node("LayerNormalization", [x, *weights], name, axis=-1, epsilon=module.eps)


class _Step(_Graph):
    def __init__(self, decoder: Any, head: nn.Linear, kind: str) -> None:
        super().__init__()
        self.decoder, self.head, self.kind = decoder, head, kind
        self.heads = decoder.layers[0].self_attn.num_heads
        self.width = decoder.embed_positions.embedding_dim
        self.head_dim = self.width // self.heads

    def build(self) -> None:
        table = self.weight("tokens", self.head.weight)
        # rows of the position table are 2 further down than the positions (BART)
        offset = self.decoder.embed_positions.offset
        places = self.weight("places", self.decoder.embed_positions.weight[offset:])
        x = self.node("Gather", [table, "token"], "embedded", axis=0)
        scale = self.decoder.embed_tokens.embed_scale
        if scale != 1.0:
            x = self.node("Mul", [x, self.weight("embed_scale", torch.tensor(scale))], "scaled")
        place = self.node("Gather", [places, "position"], "place", axis=0)
        x = self.node("Add", [x, place], "placed")
        x = self.norm(x, "norm_embedded", self.decoder.layernorm_embedding)
        for number, layer in enumerate(self.decoder.layers):
            x = self.layer(x, number, layer)
        self.node("Gemm", [x, table], "logits", transB=1)

    def layer(self, x: str, n: int, layer: Any) -> str:
        attended = self.self_attention(x, n, layer.self_attn)
        x = self.joined(x, attended, f"self_norm.{n}", layer.self_attn_layer_norm)
        attended = self.cross_attention(x, n, layer.encoder_attn)
        x = self.joined(x, attended, f"cross_norm.{n}", layer.encoder_attn_layer_norm)
        hidden = self.linear(x, f"fc1.{n}", layer.fc1.weight, layer.fc1.bias)
        hidden = self.node("Gelu", [hidden], f"gelu.{n}")
        hidden = self.linear(hidden, f"fc2.{n}", layer.fc2.weight, layer.fc2.bias)
        return self.joined(x, hidden, f"final_norm.{n}", layer.final_layer_norm)

    def joined(self, x: str, y: str, name: str, norm: nn.LayerNorm) -> str:
        return self.norm(self.node("Add", [x, y], f"{name}.sum"), name, norm)

    def self_attention(self, x: str, n: int, module: Any) -> str:
        parts = (module.q_proj, module.k_proj, module.v_proj)
        factors = (self.scale(module), 1.0, 1.0)
        weight = torch.cat([part.weight * factor for part, factor in zip(parts, factors)])
        bias = torch.cat([part.bias * factor for part, factor in zip(parts, factors)])
        qkv = self.linear(x, f"qkv.{n}", weight, bias)
        q, k, v = (f"{which}.{n}" for which in "qkv")
        self.node("Split", [qkv], q, k, v, axis=1, num_outputs=3)
        past = [
            self.node("Gather", [f"past_{which}.{n}", "beam"], f"chosen_{which}.{n}", axis=0)
            for which in PARTS
        ]
        present = [f"present_{which}.{n}" for which in PARTS]
        if self.kind == PRODUCTS:
            row = self.ints(-1, self.heads, 1, self.head_dim)
            column = self.ints(-1, self.heads, self.head_dim, 1)
            k, v = (self.node("Reshape", [y, row], f"{y}.heads") for y in (k, v))
            for new, old, grown in zip((k, v), past, present):
                self.node("Concat", [old, new], grown, axis=2)
            q = self.node("Reshape", [q, column], f"{q}.heads")
            scores = self.node("MatMul", [present[0], q], f"scores.{n}")
            scores = self.node("Reshape", [scores, self.ints(0, 0, 1, -1)], f"scored.{n}")
            shares = self.node("Softmax", [scores], f"shares.{n}", axis=-1)
            y = self.node("MatMul", [shares, present[1]], f"read.{n}")
        else:
            q, k, v = (self.node("Unsqueeze", [y, self.ints(1)], f"{y}.rows") for y in (q, k, v))
            y = self.attend([q, k, v, "", "", "", *past], f"read.{n}", *present)
        y = self.node("Reshape", [y, self.ints(-1, self.width)], f"attended.{n}")
        return self.linear(y, f"out.{n}", module.out_proj.weight, module.out_proj.bias)

    def cross_attention(self, x: str, n: int, module: Any) -> str:
        weight, bias = (p * self.scale(module) for p in (module.q_proj.weight, module.q_proj.bias))
        q = self.linear(x, f"cross_q.{n}", weight, bias)
        k, v = f"cross_key.{n}", f"cross_value.{n}"
        if self.kind == PRODUCTS:
            shape = self.ints(-1, self.heads, self.head_dim)
            q = self.node("Reshape", [q, shape], f"{q}.split")
            q = self.node("Transpose", [q], f"{q}.heads", perm=[1, 0, 2])
            scores = self.node("MatMul", [q, k], f"cross_scores.{n}")
            shares = self.node("Softmax", [scores], f"cross_shares.{n}", axis=-1)
            y = self.node("MatMul", [shares, v], f"cross_read.{n}")
            y = self.node("Transpose", [y], f"cross_rows.{n}", perm=[1, 0, 2])
        else:
            axis = self.ints(0 if self.kind == OPERATOR else 1)
            q = self.node("Unsqueeze", [q, axis], f"{q}.rows")
            y = self.attend([q, k, v], f"cross_read.{n}")
        y = self.node("Reshape", [y, self.ints(-1, self.width)], f"cross_attended.{n}")
        return self.linear(y, f"cross_out.{n}", module.out_proj.weight, module.out_proj.bias)

    def scale(self, module: Any) -> float:
        """What is folded into the weights of q: the operator scales by itself."""
        return float(module.scaling) if self.kind == PRODUCTS else 1.0

    def attend(self, inputs: list[str], *outputs: str) -> str:
        attributes = {"domain": "com.microsoft", "num_heads": self.heads}
        return self.node("MultiHeadAttention", inputs, *outputs, **attributes)


def step_model(decoder: Any, head: nn.Linear, kind: str, rows: int, keys: int) -> bytes:
    """The graph, serialized; decoder and head: transformers' BartDecoder and its lm_head."""
    from onnx import TensorProto, helper

    if decoder.config.activation_function != "gelu":
        raise ValueError(f"the graph has an exact GELU, not {decoder.config.activation_function}")
    step = _Step(decoder, head, kind)
    step.build()
    value, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    heads, head_dim = step.heads, step.head_dim
    cross = {
        PRODUCTS: ([heads, head_dim, keys], [heads, keys, head_dim]),
        OPERATOR: ([1, heads, keys, head_dim],) * 2,
        REPEATED: ([rows, heads, keys, head_dim],) * 2,
    }[kind]
    inputs = [
        value("token", TensorProto.INT64, [rows]),
        value("position", TensorProto.INT64, [1]),
        value("beam", TensorProto.INT32, [rows]),
    ]
    outputs = [value("logits", floats, [rows, head.out_features])]
    for n in range(len(decoder.layers)):
        for which, shape in zip(PARTS, cross):
            inputs.append(value(f"past_{which}.{n}", floats, [rows, heads, "T", head_dim]))
            inputs.append(value(f"cross_{which}.{n}", floats, shape))
            outputs.append(value(f"present_{which}.{n}", floats, [rows, heads, "T + 1", head_dim]))
    model = step.model
    model.graph.name = "decoder_step"
    model.graph.input.extend(inputs)
    model.graph.output.extend(outputs)
    for domain, version in (("", OPSET), ("com.microsoft", 1)):
        model.opset_import.append(helper.make_opsetid(domain, version))
    return bytes(model.SerializeToString())


def cross_inputs(decoder: Any, states: Tensor, kind: str) -> dict[str, Tensor]:
    """The inputs cross_key.N and cross_value.N from the encoder's states, [R, S, width]."""
    found = {}
    for n, layer in enumerate(decoder.layers):
        module = layer.encoder_attn
        seen = states if kind == REPEATED else states[:1]
        for which, proj in zip(PARTS, (module.k_proj, module.v_proj)):
            value = proj(seen).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            if kind == PRODUCTS:
                value = value[0].transpose(1, 2) if which == "key" else value[0]
            found[f"cross_{which}.{n}"] = value.contiguous()
    return found
