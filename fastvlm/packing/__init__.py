"""Packing: each image once in a batch, beside all the (task, language) targets that read it."""

from fastvlm.packing.balance import TargetBalancer
from fastvlm.packing.collator import PackingCollator
from fastvlm.packing.expand import expand
from fastvlm.packing.iterable import PackedIterable, pack_iterable
from fastvlm.packing.loader import ResumableDataLoader
from fastvlm.packing.sampler import TokenBudgetBatchSampler
from fastvlm.packing.samples import find_groups

__all__ = [
    "PackedIterable",
    "PackingCollator",
    "ResumableDataLoader",
    "TargetBalancer",
    "TokenBudgetBatchSampler",
    "expand",
    "find_groups",
    "pack_iterable",
]
