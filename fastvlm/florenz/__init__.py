"""The reference workload: the Florenz models of arXiv 2503.09443. Needs transformers 5."""

from fastvlm.compat.versions import without_transformers_5

if why := without_transformers_5("fastvlm.florenz"):
    raise ImportError(why)

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
