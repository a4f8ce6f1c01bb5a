"""One schema per op, one place that decides which backend runs it.

Every op is a schema in the namespace ``fastvlm``, defined here in Python so that it stands without
any extension. ``CompositeExplicitAutograd`` holds the reference; a faster backend is a ``Kernel``
registered for its device, asked at each call whether it can serve these arguments. It answers with
a reason when it cannot, and the reference serves: the same reasons are what
``python -m fastvlm env`` prints.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastvlm", "FRAGMENT")

BACKENDS = ("reference", "cpu", "flash", "triton", "cuda")
# the backends under each dispatch key, the preferred one first
CANDIDATES = {"CPU": ["cpu"], "CUDA": ["flash", "cuda", "triton"]}
# a library that serves some ops on purpose: that it has no kernel for another is no news
_PARTIAL = ("flash", "cuda")


class BackendError(RuntimeError):
    """A backend was forced with ``fastvlm.use`` and cannot serve the call."""


@dataclass(frozen=True)
class Kernel:
    """A backend's implementation of one op.

    unavailable() says why the backend cannot be used on this machine at all, unsupported(*args)
    why it cannot serve one call; both give None when it can. yields(*args) says why a call that it
    can serve should rather go to a backend after it that can, too. calls: in words, which calls are
    served where a backend after it can serve them, too; "" for none, None for all.
    """

    backend: str
    run: Callable[..., Any]
    unavailable: Callable[[], str | None]
    unsupported: Callable[..., str | None]
    yields: Callable[..., str | None] | None = None
    calls: str | None = None


@dataclass
class Op:
    name: str
    reference: Callable[..., Any]
    kernels: dict[str, Kernel]


OPS: dict[str, Op] = {}
# kernels by op and backend: a backend may be imported before the op is defined
_KERNELS: defaultdict[str, dict[str, Kernel]] = defaultdict(dict)
_forced: str | None = None


def define(
    name: str,
    signature: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define ``fastvlm::name`` with its reference and its fake (shape-only) implementation."""
    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvlm::{name}", fake, lib=_LIBRARY)
    op = OPS[name] = Op(name, reference, _KERNELS[name])
    for device, candidates in CANDIDATES.items():
        _LIBRARY.impl(name, _chooser(op, candidates, device.lower()), device)
    return getattr(torch.ops.fastvlm, name).default


def register(name: str, kernel: Kernel) -> None:
    """Put a backend's kernel under an op."""
    _KERNELS[name][kernel.backend] = kernel


def _chooser(op: Op, candidates: list[str], device: str) -> Callable[..., Any]:
    """The implementation under a dispatch key. A decoding step is hundreds of calls of this."""
    kernels, reference = op.kernels, op.reference

    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled(device):
            # the public functions have cast what autocast casts; inside, float32 means float32
            with torch.autocast(device, enabled=False):
                return choose(*args)
        return choose(*args)

    def choose(*args: Any) -> Any:
        if _forced is not None:
            if _forced == "reference":
                return reference(*args)
            if _forced in candidates:
                return by_force(_forced, *args)
        yielding = None
        for backend in candidates:
            kernel = kernels.get(backend)
            if kernel is None or kernel.unavailable() is not None:
                continue
            if kernel.unsupported(*args) is None:
                if kernel.yields is not None and kernel.yields(*args) is not None:
                    yielding = yielding or kernel
                    continue
                return kernel.run(*args)
        return (reference if yielding is None else yielding.run)(*args)

    def by_force(backend: str, *args: Any) -> Any:
        kernel, why = kernels.get(backend), "it has no kernel for this op"
        if kernel is not None:
            reason = kernel.unavailable() or kernel.unsupported(*args)
            if reason is None:
                return kernel.run(*args)
            why = f"{backend}: {reason}"
        raise BackendError(f"fastvlm.{op.name} cannot run on backend {backend!r}: {why}")

    return run


def forced() -> str | None:
    """The backend that `use` forces now."""
    return _forced


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend for every op inside the ``with`` block, in the whole process.

    backend: "reference" (plain PyTorch), "cpu" (C++), "flash" (flash-attn), "triton" or "cuda". A
    call that the backend cannot serve raises BackendError with the reason, instead of falling back;
    ops on the tensors of another device are not affected. An unknown name raises ValueError.
    """
    global _forced
    if backend not in BACKENDS:
        wanted = ", ".join(repr(b) for b in BACKENDS)
        raise ValueError(f"fastvlm.use: backend must be one of {wanted}; got {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def status(device: str) -> list[tuple[str, str, str]]:
    """For each public op: (name, what serves it on this device type, why not a better backend).

    Several backends where the first ones serve only some of the calls, each with which.
    """
    wanted = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return [(op.name, *_serving(op, CANDIDATES[wanted])) for op in OPS.values()]


def _serving(op: Op, candidates: list[str]) -> tuple[str, str]:
    serving: list[str] = []
    reasons, whole, yielding = [], "reference", None
    for backend in candidates:
        kernel = op.kernels.get(backend)
        if kernel is None and backend in _PARTIAL:
            continue
        reason = f"no {backend} kernel yet" if kernel is None else kernel.unavailable()
        if kernel is None or reason is not None:
            reasons.append(f"{backend}: {reason}")
        elif kernel.calls is None:
            whole = backend
            break
        elif kernel.calls:
            serving.append(f"{backend} ({kernel.calls})")
        else:
            yielding = yielding or backend
    if whole == "reference" and yielding is not None:
        whole = yielding
    return ", ".join([*serving, whole]), "; ".join(reasons)
