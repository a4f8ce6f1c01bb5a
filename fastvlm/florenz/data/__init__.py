"""Training data in the form that arXiv 2503.09443 published: shards of images with annotations."""

from fastvlm.florenz.data.annotations import (
    GROUPS,
    Annotation,
    annotations_of,
    marked_prompt,
    spelled_prompt,
)
from fastvlm.florenz.data.shards import DataError, ShardSamples, Tally, shards_of, write_shards

__all__ = [
    "GROUPS",
    "Annotation",
    "DataError",
    "ShardSamples",
    "Tally",
    "annotations_of",
    "marked_prompt",
    "shards_of",
    "spelled_prompt",
    "write_shards",
]
