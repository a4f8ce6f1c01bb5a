"""Configs that another Triton than 3.8 compiles into code that spills, and what serves instead.

The tables are made for 3.8. Counted for sm_90 (Hopper) with 3.6.0, 3.7.1 and 3.9.0 and for sm_80
(A100) with 3.7.1, all kernels. The rest nobody has counted yet:
`python -m fastvlm compile --arch sm_80` does, in an environment that has another Triton. What is
not named here is as the tables say. Programs that have no other config spill there: backward passes
of float32 heads of 256 with dropout and a softcap, of `rms_norm` in float32 rows of 1024, and of
`residual_rms_norm` with a gate in 16 bits and rows of 4096.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm.triton.configs import Case, Config, Table
from fastvlm.triton.configs.heads import block, keys
from fastvlm.triton.configs.products import sliced, tile


@dataclass(frozen=True)
class Spill:
    """config: replaced by those of instead, or left out. of: the number of the only case that is
    meant, among those of its kernel that have it once the spills before it are dealt with."""

    config: Config
    instead: tuple[Config, ...] = ()
    of: int | None = None


Version = tuple[int, ...]
_KV = "attention_backward_kv"
_DH, _DLOGITS = "linear_cross_entropy_dh", "linear_cross_entropy_dlogits"
_WIDE = [Spill(tile(128, 256, 64, 8, 3)), Spill(tile(128, 256, 64, 8, 4))]
_FLOAT32 = Spill(tile(64, 128, 32, 8, 3))
_FLOAT32_16 = Spill(tile(16, 128, 32, 4, 4))
_RANKED = Spill(tile(32, 128, 64, 4, 5))
_KV_256 = Spill(block(32, 64, 8, 2, apart=True))  # with dropout and a softcap
_KV_128 = Spill(block(32, 32, 4, 1))

# by minor version of Triton, family and kernel
SPILLING: dict[Version, dict[str, dict[str, list[Spill]]]] = {
    (3, 6): {
        "sm90": {
            "attention_forward": [Spill(block(32, 64, 4, 2), (block(32, 32, 4, 2),))],
            _KV: [_KV_256, _KV_128],
            # with beams: heads of 256 with a window and a softcap, and heads of 96
            "cached_attention": [
                Spill(keys(64, 4, 2), of=0),
                Spill(keys(32, 4, 2), (keys(32, 8, 2),), of=0),
                Spill(keys(64, 4, 2), of=0),
            ],
            "linear_topk": [_RANKED],
            _DH: [*_WIDE, _FLOAT32],
            _DLOGITS: [_FLOAT32],
            "linear_cross_entropy_dweight": [_FLOAT32],
        },
    },
    (3, 7): {
        "sm90": {
            _KV: [_KV_128],
            "cached_attention": [Spill(keys(64, 4, 2), of=0)],
            _DH: _WIDE,
            _DLOGITS: [_FLOAT32],
        },
        "sm80": {
            "attention_forward": [
                Spill(block(64, 64, 4, 2)),
                Spill(block(32, 64, 4, 2), (block(32, 32, 4, 2),)),
            ],
            _KV: [Spill(block(32, 64, 4, 2))],
            "linear_cross_entropy": [
                Spill(tile(16, 64, 64, 4, 4)),
                Spill(tile(16, 128, 32, 4, 4), (tile(16, 64, 32, 4, 4),)),
            ],
            _DH: [Spill(tile(16, 64, 64, 4, 4)), Spill(tile(64, 64, 16, 4, 4))],
        },
    },
    (3, 9): {
        "sm90": {
            "attention_backward_q": [Spill(block(64, 32, 8, 2))],
            _KV: [_KV_256, _KV_128, Spill(block(16, 16, 4, 1), (block(16, 16, 8, 1),))],
            "linear_topk": [_RANKED, _FLOAT32_16],
            _DH: [*_WIDE, _FLOAT32],
            _DLOGITS: [_FLOAT32_16],
            "geglu_forward": [Spill(sliced(16, 16, 128, warps=2, stages=4))],
            "gelu_backward": [Spill(sliced(128, 256, 64, warps=8, stages=3, slices=8))],
            # of a weight of 16 bits
            "low_precision_linear": [Spill(sliced(64, 32, 64, warps=4, stages=4), of=1)],
        },
    },
}


def without_spills(family: str, table: Table, version: Version | None) -> Table:
    """table as this Triton may choose from it; None: there is no Triton, and nothing to choose."""
    if version is None:
        return table
    spills = SPILLING.get(version[:2], {}).get(family, {}).items()
    return {**table, **{kernel: _served(table[kernel], each) for kernel, each in spills}}


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
