"""A decoder in ONNX Runtime or OpenVINO, driven by transformers' own generate().

A session runs the graph of `benchmarks.decoder_graph` and holds the past where the engine wants
it. What generate() reorders is one row of numbers: the engine gathers its past by them inside the
next step.
"""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from benchmarks import decoder_graph as graph
from benchmarks import engines

# what a results file says beside the figures
SETTINGS = {
    "onnxruntime": "all graph optimizations, threads spin within a step and sleep after it, "
    "io binding, weights prepacked, past gathered by beam in the graph",
    "openvino": "latency hint, float32 arithmetic and past unless said, past as state gathered by "
    "beam",
    "both": "numbers of beams and keys fixed, PyTorch's part of the loop on one thread",
}


class Session:
    """What a step is given, in memory that the engine reads in place."""

    def __init__(self, decoder: Any, head: nn.Linear, kind: str, rows: int) -> None:
        attention = decoder.layers[0].self_attn
        self.kind, self.layers = kind, len(decoder.layers)
        self.past_shape = (rows, attention.num_heads, 0, attention.head_dim)
        self.names = [f"{which}.{n}" for n in range(self.layers) for which in graph.PARTS]
        self.inputs = {
            "token": np.zeros(rows, np.int64),
            "position": np.zeros(1, np.int64),
            "beam": np.zeros(rows, np.int32),
        }

    def begin(self, cross: dict[str, Tensor]) -> None:
        """A new caption of the image whose keys and values these are."""
        raise NotImplementedError

    def run(self) -> Tensor:
        """The logits [R, vocabulary] for `inputs`; overwritten by the next step."""
        raise NotImplementedError


def _int8(model: bytes) -> bytes:
    """ONNX Runtime's dynamic quantization: int8 weights with a scale for each of their rows, int8
    activations with one for all."""
    import onnx
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            onnx.load_from_string(model),
            path,
            op_types_to_quantize=["MatMul"],  # and Gemm, which becomes one
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return path.read_bytes()


class OnnxRuntime(Session):
    """The past goes from a step's outputs to the next one's inputs without a copy (io binding)."""

    def __init__(
        self,
        decoder: Any,
        head: nn.Linear,
        kind: str,
        rows: int,
        keys: int,
        int8: bool = False,
    ) -> None:
        import onnxruntime

        super().__init__(decoder, head, kind, rows)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # a step has a hundred operators: their threads wait for the next one busily, and sleep when
        # the step is done
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = graph.step_model(decoder, head, kind, rows, keys)
        self.session = onnxruntime.InferenceSession(
            _int8(model) if int8 else model, options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.logits = torch.empty(rows, head.out_features)
        # on the CPU an OrtValue is the array's own memory
        for name, array in self.inputs.items():
            self.binding.bind_ortvalue_input(name, self.value(array))
        self.past: list[Any] = []

    def begin(self, cross: dict[str, Tensor]) -> None:
        for name, tensor in cross.items():
            self.binding.bind_ortvalue_input(name, self.value(tensor.numpy()))
        self.cross = cross
        self.past = [self.value(np.zeros(self.past_shape, np.float32)) for _ in self.names]

    def run(self) -> Tensor:
        self.binding.clear_binding_outputs()
        self.binding.bind_ortvalue_output("logits", self.value(self.logits.numpy()))
        for name, past in zip(self.names, self.past):
            self.binding.bind_ortvalue_input(f"past_{name}", past)
            self.binding.bind_output(f"present_{name}", "cpu")
        self.session.run_with_iobinding(self.binding)
        self.past = self.binding.get_outputs()[1:]
        return self.logits


class OpenVino(Session):
    """The past is the model's state, as optimum-intel has it."""

    def __init__(
        self,
        decoder: Any,
        head: nn.Linear,
        kind: str,
        rows: int,
        keys: int,
        precision: str = "f32",
    ) -> None:
        import openvino

        super().__init__(decoder, head, kind, rows)
        self.tensor = openvino.Tensor
        core = engines.openvino_core()
        model = core.read_model(io.BytesIO(graph.step_model(decoder, head, kind, rows, keys)))
        self._keep_past(model)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        for name, array in self.inputs.items():
            self.request.set_tensor(name, self.tensor(array, shared_memory=True))

    def _keep_past(self, model: Any) -> None:
        from openvino import opset13
        from openvino.passes import MakeStateful, Manager

        manager = Manager()
        manager.register_pass(
            MakeStateful({f"past_{name}": f"present_{name}" for name in self.names})
        )
        manager.run_passes(model)
        empty = opset13.constant(np.zeros(self.past_shape, np.float32))
        for node in model.get_ops():
            if node.get_type_name() == "ReadValue":
                node.set_arguments([empty])
            elif node.get_type_name() == "ScaledDotProductAttention":
                # the scale is the default one; named, it brings an empty mask along, at which the
                # attention that keeps its own past stops
                q, k, v = (node.input_value(place) for place in range(3))
                plain = opset13.scaled_dot_product_attention(q, k, v, causal=False)
                node.output(0).replace(plain.output(0))
        model.validate_nodes_and_infer_types()

    def begin(self, cross: dict[str, Tensor]) -> None:
        self.request.reset_state()
        for name, tensor in cross.items():
            self.request.set_tensor(name, self.tensor(tensor.numpy(), shared_memory=True))
        self.cross = cross

    def run(self) -> Tensor:
        self.request.infer(share_outputs=True)
        return torch.from_numpy(self.request.get_tensor("logits").data)


class _Past:
    """What generate() takes for a cache."""

    is_compileable = False

    def __init__(self, rows: int) -> None:
        self.length = 0
        self.beam = torch.arange(rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.beam = beam_idx


class EngineModel(PreTrainedModel, GenerationMixin):
    """generate() over a session: the same beam search as for the model whose decoder it runs."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, source: Any, session: Session) -> None:
        language = source.model.language_model
        super().__init__(copy.deepcopy(language.config))  # which it writes to
        self.generation_config = source.generation_config
        self.session = session
        self.projections = [language.decoder]  # in a list: no submodule
        self.place = nn.Parameter(torch.empty(0))  # says to generate() where the model is

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: _Past | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        session = self.session
        if past_key_values is None:
            past_key_values = _Past(decoder_input_ids.shape[0])
            session.begin(graph.cross_inputs(self.projections[0], encoder_outputs[0], session.kind))
        session.inputs["token"][:] = decoder_input_ids[:, -1].numpy()
        session.inputs["position"][0] = past_key_values.length
        session.inputs["beam"][:] = past_key_values.beam.numpy()
        past_key_values.length += 1
        logits = session.run().unsqueeze(1)
        return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)

    def generate(self, *args: Any, **settings: Any) -> Any:
        # PyTorch's own threads go on spinning for a while after each operator of the loop, on the
        # cores that the engine's threads want next: on 2 cores a step of ONNX Runtime took 22.9 ms
        # instead of 19.1, one of OpenVINO the same either way
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().generate(*args, **settings)
        finally:
            torch.set_num_threads(threads)

    def get_encoder(self, modality: str | None = None) -> Any:
        return None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
