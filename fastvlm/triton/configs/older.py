"""Configs that an older Triton compiles into code that spills, and what serves in their place.

Seen with 3.6.0 for sm_90 (Hopper): 8 to 48 bytes of a program. What is not named here is as the
tables say; of most kernels, and of other architectures, nobody has counted yet with an older
Triton: `python -m fastvlm compile --arch sm_90` does, in an environment that has it. The backward
pass of float32 heads of 256, with dropout and a softcap, spills 16 bytes there; its halves spill
too, launched apart.
"""

from __future__ import annotations

from fastvlm.triton.configs import Case, Config, Table
from fastvlm.triton.configs.heads import block
from fastvlm.triton.configs.products import tile

# below this version of Triton, by family and kernel: a config, and those in its place
BEFORE = (3, 7)
Instead = list[tuple[Config, list[Config]]]
SPILLING: dict[str, dict[str, Instead]] = {
    "sm90": {
        "attention_forward": [(block(32, 64, 4, 2), [block(32, 32, 4, 2)])],
        "attention_backward_kv": [
            # with dropout and a softcap; the config after it serves
            (block(32, 64, 8, 2, apart=True), []),
        ],
        "linear_topk": [(tile(32, 128, 64, 4, 5), [])],
    },
}


def without_spills(family: str, table: Table, version: tuple[int, ...] | None) -> Table:
    """table as this Triton may choose from it; None: there is no Triton, and nothing to choose."""
    if version is None or version >= BEFORE:
        return table
    changed = {
        kernel: [
            Case([new for config in case.configs for new in _instead(config, pairs)], case.when)
            for case in table[kernel]
        ]
        for kernel, pairs in SPILLING.get(family, {}).items()
    }
    return {**table, **changed}


def _instead(config: Config, pairs: Instead) -> list[Config]:
    return next((new for old, new in pairs if old == config), [config])
