"""The GPUs that kernels are compiled for, and how many programs one multiprocessor holds at once.

The figures are those of the vendors' documents: table "Technical Specifications per Compute
Capability" of NVIDIA's CUDA C++ programming guide, AMD's CDNA 3 instruction set guide.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """family: the file of configs that serves it. shared: bytes that one program may take.

    Of one multiprocessor: shared_all bytes of shared memory, reserved of them taken by each
    program beside its own; registers (of 32 bits and a whole warp) for each of its slices, which
    hold at most slots warps; unit: registers come in multiples of it.
    """

    backend: str
    family: str
    number: int
    warp: int
    shared: int
    shared_all: int
    reserved: int
    slices: int
    slots: int
    programs: int
    registers: int
    unit: int

    def occupancy(self, registers: int, shared: int, warps: int) -> tuple[int, str]:
        """Programs resident on one multiprocessor, and what keeps them from being more."""
        each = max(self.unit, -(-registers // self.unit) * self.unit)
        per_slice = min(self.slots, self.registers // each)
        by_registers = per_slice * self.slices // warps
        taken = -(-shared // 128) * 128 + self.reserved
        bounds = {
            "warps": self.slots * self.slices // warps,
            "programs": self.programs,
            "registers": by_registers,
            "shared memory": self.shared_all // taken if taken else self.programs,
        }
        limit = min(bounds, key=lambda name: bounds[name])
        return bounds[limit], limit

    def full(self, programs: int, warps: int) -> float:
        """The share of a multiprocessor's warps that is in use."""
        return programs * warps / (self.slots * self.slices)


def _sm(number: int, family: str, shared: int, warps: int, programs: int) -> Architecture:
    # 64 K registers in four slices, handed to warps in units of 8 for each thread
    return Architecture(
        "cuda", family, number, 32, (shared - 1) * KIB, shared * KIB, KIB, 4, warps // 4, programs,
        512, 8,
    )  # fmt: skip


ARCHITECTURES = {
    "sm_80": _sm(80, "sm80", 164, 64, 32),
    "sm_86": _sm(86, "sm86", 100, 48, 16),
    "sm_89": _sm(89, "sm86", 100, 48, 24),
    "sm_90": _sm(90, "sm90", 228, 64, 32),
    "sm_100": _sm(100, "sm100", 228, 64, 32),
    "sm_120": _sm(120, "sm86", 100, 48, 24),
    "gfx942": Architecture(
        "hip", "gfx9", 0, 64, 64 * KIB, 64 * KIB, 0, 4, 8, 32, 512, 8
    ),
}  # fmt: skip
DEFAULT = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
