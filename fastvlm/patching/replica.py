"""A small copy of a part of a model, with weights of its own, on which something can be tried.

Nothing of the original is run or changed: its modules are walked through, and of its weights only
the shapes are read. So its hooks do not fire, its buffers keep what they hold, and the random
numbers that the program goes on to draw are those it would have drawn.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvlm.patching.classes import unpatched_class

ROWS = 32  # of a table that has one for each token or place
WINDOW = 3
DTYPE = torch.float64

_EPS = 1.0
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
# where there are no more layers than one, and no more tokens than ROWS
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer")


class Float64(TorchFunctionMode):
    """Within it whatever asks for a narrower float gets float64: two ways to compute one thing
    differ by their roundings alone, and those are far below what tells two things apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return DTYPE if isinstance(value, torch.dtype) and value in _NARROW else value


def without_weights(module: nn.Module) -> str | None:
    """Why the weights of a module are not here to be looked at; None where they are."""
    for owner in module.modules():
        if getattr(vars(owner).get("_hf_hook"), "offload", False):
            return "offloaded"
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                return "on the meta device"
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
                return f"{type(tensor).__name__}s"
            if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                return "quantized"
    return None


class Replica:
    """Copies of modules that belong together: what they share is shared by the copies."""

    def __init__(self, kept: tuple[int, ...] | None = None) -> None:
        """kept: of a stack's layers, those that are copied."""
        self.kept = kept
        self.window: int | None = None  # of the original: few rows are no longer than it
        self.random = torch.Generator().manual_seed(0)
        self.copies: dict[int, Any] = {}  # by the id of the original
        self._originals: list[Any] = []  # ids stay theirs while they live

    def of(self, module: nn.Module, layers: Any = None) -> nn.Module:
        """layers: the ModuleList of which some are kept."""
        if not self.copies:
            window = getattr(vars(module).get("config"), "sliding_window", None)
            self.window = window if isinstance(window, int) else None
        known = self.copies.get(id(module))
        if known is not None:
            return known
        cls = unpatched_class(module)
        new: nn.Module = cls.__new__(cls)
        self.copies[id(module)] = new
        self._originals.append(module)
        fresh = vars(nn.Module())
        vars(new).update(fresh)
        vars(new)["training"] = False
        for name, value in vars(module).items():
            if name not in fresh and name not in ("forward", "_hf_hook", "_old_forward"):
                vars(new)[name] = self._value(name, value)
        if "Dropout" in cls.__name__ and "p" in vars(new):
            vars(new)["p"] = 0.0
        # a table of places or tokens is cut, and so is what counts its rows
        cut = isinstance(module, nn.Embedding) and module.num_embeddings > ROWS
        if cut:
            vars(new)["num_embeddings"] = ROWS
            padding: Any = vars(module).get("padding_idx")
            vars(new)["padding_idx"] = None if padding is None else min(padding, ROWS - 1)
        for name, tensor in module._parameters.items():
            new._parameters[name] = None if tensor is None else self._drawn(tensor, cut)
        for name, buffer in module._buffers.items():
            new._buffers[name] = None if buffer is None else _plain(buffer)
        new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        if module is layers and self.kept is not None:
            every = list(module.children())
            new._modules.update({str(n): self.of(every[k]) for n, k in enumerate(self.kept)})
            return new
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else self._child(child, layers)
        return new

    def _child(self, child: nn.Module, layers: Any) -> nn.Module:
        base = getattr(child, "base_layer", None)  # an adapter is called, whatever it does
        return self.of(base if isinstance(base, nn.Module) else child, layers)

    def _drawn(self, like: Tensor, cut: bool) -> nn.Parameter:
        """Weights far from where they begin: zero gates open, norms scale, biases shift."""
        known = self.copies.get(id(like))
        if known is not None:
            return known
        shape = (ROWS, *like.shape[1:]) if cut else like.shape
        values = torch.empty(shape, dtype=DTYPE)
        if like.dim() < 2:
            values.uniform_(0.25, 1.25, generator=self.random)
        else:
            wide = 1.0 if cut else 3 * like[0].numel() ** -0.5
            values.uniform_(-wide, wide, generator=self.random)
        # gradients of what is small alone: they need what is large, and not its own
        parameter = nn.Parameter(values, requires_grad=like.dim() < 2 or cut)
        self._originals.append(like)
        self.copies[id(like)] = parameter
        return parameter

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, (bool, str)) or value is None:
            return False if name == "gradient_checkpointing" else value
        if isinstance(value, float):
            if "drop" in name:
                return 0.0
            # a norm behind a layer shows how large the layer's rows are
            return _EPS if name in ("eps", "variance_epsilon") else value
        if isinstance(value, int):
            if name == "layer_idx" and self.kept is not None:
                return self.kept.index(value) if value in self.kept else 0
            # what is off by one stays off by one
            if name == "sliding_window" and self.window is not None:
                return value - self.window + WINDOW
            return value
        if isinstance(value, Tensor):
            return _plain(value)
        if isinstance(value, (list, tuple, set)) and type(value) in (list, tuple, set):
            return type(value)(self._value("", each) for each in value)
        if type(value) is dict:
            return {key: self._value("", each) for key, each in value.items()}
        if isinstance(value, nn.Module):
            return self.of(value)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return self._config(value)
        return value

    def _config(self, config: Any) -> Any:
        known = self.copies.get(id(config))
        if known is not None:
            return known
        new = self.copies[id(config)] = copy.deepcopy(config)
        self._originals.append(config)
        for part in (new, *(v for v in vars(new).values() if hasattr(v, "model_type"))):
            self._adjust(part)
        new._attn_implementation = "eager"
        return new

    def _adjust(self, config: Any) -> None:
        values = vars(config)
        for name in _TOKENS:
            token = values.get(name)
            if isinstance(token, (list, tuple)):
                token = token[0] if token else None
            if token is not None:
                values[name] = min(int(token), ROWS - 1)
        if isinstance(values.get("sliding_window"), int):
            values["sliding_window"] = WINDOW
        if isinstance(values.get("max_source_positions"), int):  # frames are as many as places
            values["max_source_positions"] = min(values["max_source_positions"], ROWS)
        values.update({n: 0.0 for n, v in values.items() if "drop" in n and isinstance(v, float)})
        if self.kept is None:
            return
        kinds = values.get("layer_types")
        if kinds is not None and max(self.kept) < len(kinds):
            values["layer_types"] = [kinds[index] for index in self.kept]
        count = len(self.kept)
        values.update({name: count for name in _LAYERS if isinstance(values.get(name), int)})


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().clone()
    return tensor.double() if tensor.is_floating_point() else tensor


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What a copy of a module would be made of: equal for layers that differ in weights alone."""
    found: list[Any] = []
    for name, part in module.named_modules():
        values = sorted(
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training")
        )
        shapes = [(key, p.shape) for key, p in part._parameters.items() if p is not None]
        found.append((name, unpatched_class(part), tuple(values), tuple(shapes)))
    return tuple(found)
