"""Tensors that reach beyond 2^31 elements, for kernels in an emulator, without their memory.

A file with holes holds them. The emulator, which copies what a launch is given, is handed their
rows alone, each at its address: an offset that wraps around in 32 bits is an access outside.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

# elements between rows: with three of them, or with more than 32, the last is beyond 2^31
APART, LESS_APART = 2**30 + 8, 2**26 + 16
SIZE = 2**31 + 2**30


class Far:
    def __init__(self, store: Tensor) -> None:
        self.store, self.used, self.rows = store, 0, dict[int, Tensor]()

    def put(self, x: Tensor) -> Tensor:
        """x, its rows as far apart as their number allows."""
        apart = APART if x.shape[0] <= 3 else LESS_APART
        inner = x[0].numel()
        assert (x.shape[0] - 1) * apart > 2**31
        assert self.used + inner <= LESS_APART
        start, self.used = self.used, self.used + -(-inner // 8) * 8
        far = self.store.as_strided(x.shape, (apart, *x[0].stride()), start)
        far.copy_(x)
        for row in far:
            self.rows[row.data_ptr()] = row
        return far


@contextlib.contextmanager
def far_tensors(dtype: torch.dtype = torch.bfloat16) -> Iterator[Far]:
    """For use inside `emulator.emulated()`."""
    from ttsem import harness, memory

    with tempfile.NamedTemporaryFile() as file:
        store = torch.from_file(file.name, shared=True, size=SIZE, dtype=dtype)
        far, copy, register = Far(store), harness.storage_copy, memory.Memory.register

        def copy_of_rows(x: Tensor) -> tuple[int, object]:
            if x.untyped_storage().data_ptr() != store.data_ptr():
                return copy(x)
            return store.data_ptr(), store[:1].view(torch.int16).numpy().copy()

        def register_rows(self: memory.Memory, base: int, array: object) -> None:
            if base != store.data_ptr():
                register(self, base, array)
                return
            for address, row in far.rows.items():
                register(self, address, row.contiguous().view(torch.int16).numpy().copy())

        harness.storage_copy, memory.Memory.register = copy_of_rows, register_rows
        try:
            yield far
        finally:
            harness.storage_copy, memory.Memory.register = copy, register
