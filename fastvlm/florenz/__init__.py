"""The reference workload: the Florenz models of arXiv 2503.09443. Needs transformers 5."""

import importlib.metadata

if int((_version := importlib.metadata.version("transformers")).split(".")[0]) < 5:
    raise ImportError(f"fastvlm.florenz needs transformers 5, here is {_version}")

from fastvlm.florenz.config import FlorenzConfig
from fastvlm.florenz.freezing import freeze_as_published, parameter_counts
from fastvlm.florenz.model import FlorenzForConditionalGeneration, FlorenzModel
from fastvlm.florenz.parts import from_pretrained_parts
from fastvlm.florenz.vocabulary import remapped_embedding

__all__ = [
    "FlorenzConfig",
    "FlorenzForConditionalGeneration",
    "FlorenzModel",
    "freeze_as_published",
    "from_pretrained_parts",
    "parameter_counts",
    "remapped_embedding",
]
