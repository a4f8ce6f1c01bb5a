"""The reference workload: the Florenz models of arXiv 2503.09443. Needs transformers 5."""

from fastvlm.florenz.config import FlorenzConfig
from fastvlm.florenz.freezing import freeze_as_published, parameter_counts
from fastvlm.florenz.model import FlorenzForConditionalGeneration, FlorenzModel

__all__ = [
    "FlorenzConfig",
    "FlorenzForConditionalGeneration",
    "FlorenzModel",
    "freeze_as_published",
    "parameter_counts",
]
