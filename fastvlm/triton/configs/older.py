"""Configs that an older Triton compiles into code that spills, and what serves in their place.

Counted for sm_90 (Hopper): with 3.6.0 of some kernels, with 3.7.1 of all, 8 to 48 bytes of a
program. What is not named here is as the tables say; for other architectures nobody has counted yet
with an older Triton: `python -m fastvlm compile --arch sm_80` does, in an environment that has it.
Two programs have no other config and spill there: the backward pass of float32 heads of 256, with
dropout and a softcap (16 bytes with 3.6.0; its halves spill too, launched apart), and that of
`residual_rms_norm` with a gate, in 16 bits and rows of 4096 (8 bytes with 3.7.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm.triton.configs import Case, Config, Table
from fastvlm.triton.configs.heads import block, keys
from fastvlm.triton.configs.products import tile


@dataclass(frozen=True)
class Spill:
    """config: replaced by those of instead, or left out. of: the number of the only case that is
    meant, among those of its kernel that have it."""

    config: Config
    instead: tuple[Config, ...] = ()
    of: int | None = None


Version = tuple[int, ...]
# below a version of Triton, by family and kernel
SPILLING: dict[Version, dict[str, dict[str, list[Spill]]]] = {
    (3, 7): {
        "sm90": {
            "attention_forward": [Spill(block(32, 64, 4, 2), (block(32, 32, 4, 2),))],
            # with dropout and a softcap; the config after it serves
            "attention_backward_kv": [Spill(block(32, 64, 8, 2, apart=True))],
            "linear_topk": [Spill(tile(32, 128, 64, 4, 5))],
        },
    },
    (3, 8): {
        "sm90": {
            # heads of 128 with dropout and a softcap
            "attention_backward_kv": [Spill(block(32, 32, 4, 1))],
            # heads of 256 with beams, a window and a softcap
            "cached_attention": [Spill(keys(64, 4, 2), of=0)],
            "linear_cross_entropy_dh": [
                Spill(tile(128, 256, 64, 8, 3)),
                Spill(tile(128, 256, 64, 8, 4)),
            ],
            # float32 with a bias and a softcap
            "linear_cross_entropy_dlogits": [Spill(tile(64, 128, 32, 8, 3))],
        },
    },
}


def without_spills(family: str, table: Table, version: Version | None) -> Table:
    """table as this Triton may choose from it; None: there is no Triton, and nothing to choose."""
    if version is None:
        return table
    for below, families in SPILLING.items():
        if version < below:
            spills = families.get(family, {}).items()
            table = {**table, **{kernel: _served(table[kernel], each) for kernel, each in spills}}
    return table


def _served(cases: list[Case], spills: list[Spill]) -> list[Case]:
    for spill in spills:
        having = [place for place, case in enumerate(cases) if spill.config in case.configs]
        meant = having if spill.of is None else [having[spill.of]]
        cases = [
            Case(_without(case.configs, spill), case.when) if place in meant else case
            for place, case in enumerate(cases)
        ]
    return cases


def _without(configs: list[Config], spill: Spill) -> list[Config]:
    return [
        new
        for config in configs
        for new in (spill.instead if config == spill.config else (config,))
    ]
