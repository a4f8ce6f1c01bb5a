"""A ladder of small sizes in the form of the published ones, with the recipe of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastvlm.florenz.world.scene import Variety

DECODERS = ("frozen", "scratch")
# what the decoder of the frozen family has read before: T of the second law
MULTILINGUALITY = {2: ("en", "de"), 4: ("en", "de", "fr", "es"),
                   6: ("en", "de", "fr", "es", "ru", "zh")}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """pixels: of a picture's side. width, layers: of encoder and decoder. images: in a batch of one
    process, with targets texts each. steps, language_steps, vision_steps: of training, and of the
    language model and the vision tower before it. variety: how much of the world it sees. vision:
    widths of the tower's stages.
    """

    pixels: int
    width: int
    layers: int
    images: int
    targets: int
    steps: int
    language_steps: int
    vision_steps: int
    variety: Variety = field(default_factory=Variety)
    vision: tuple[int, ...] = (32, 64, 64, 128)
    learning_rate: float = 3e-3
    vision_rate: float = 2e-3

    @property
    def image_tokens(self) -> int:
        """The mean and every position of the tower, 4 x 4 of them."""
        return 1 + _POSITIONS**2

    @property
    def pictures(self) -> int:
        """In a batch of one process, where the tower learns without text."""
        return self.images

    @property
    def strides(self) -> list[int]:
        """Of the tower's stages: as published where the picture allows it."""
        return [4, 2, 2, 1] if self.pixels == 16 * _POSITIONS else [4, 2, 1, 1]


_POSITIONS = 4
_FEW = Variety(kinds=6, most=2, place=0.0)
SIZES = {
    "mini": Size(32, 32, 1, 2, 3, 6, 4, 2, _FEW, (16, 16, 32, 32)),
    "nano": Size(32, 32, 1, 32, 2, 1000, 200, 900, _FEW, (16, 16, 32, 32)),
    "micro": Size(32, 48, 2, 32, 2, 1000, 200, 900, _FEW, (16, 32, 32, 64)),
    "tiny": Size(32, 64, 2, 32, 2, 1000, 200, 900, _FEW),
    "small": Size(32, 128, 3, 32, 2, 1500, 400, 1000, _FEW, (32, 64, 128, 128), 2e-3),
    "base": Size(64, 192, 4, 32, 2, 6000, 1500, 3000, Variety(), (32, 64, 128, 256)),
}


def config_of(size: Size, decoder: str, prompt_words: int, words: int) -> Any:
    """The FlorenzConfig of a size. prompt_words, words: tokens of the two vocabularies, the image's
    placeholder not counted."""
    from fastvlm.florenz import FlorenzConfig

    heads = max(1, size.width // 32)
    # products as large at the beginning as in the published sizes, whose sums are longer
    std, vision_std = 0.02 * (768 / size.width) ** 0.5, 0.02 * (1024 / size.vision[-1]) ** 0.5
    bart = {
        "init_std": std,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "max_position_embeddings": 256,
    }  # fmt: skip
    # DaViT halves the picture three times more after its first convolution; a small picture less
    # often, or nothing would be left of it, and windows are what is left, or they would be padding
    vision = {
        "embed_dim": list(size.vision), "num_heads": [max(1, d // 32) for d in size.vision],
        "num_groups": [max(1, d // 32) for d in size.vision], "depths": [1, 1, 1, 1],
        "patch_stride": size.strides, "window_size": _POSITIONS, "drop_path_rate": 0.0,
        "initializer_range": vision_std,
    }  # fmt: skip
    calm = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if decoder == "scratch":
        own: dict[str, Any] = {**bart, **calm}
    else:
        key_heads = max(1, heads // 2)
        own = {
            "hidden_size": size.width, "intermediate_size": 4 * size.width,
            "num_attention_heads": 2 * key_heads, "num_key_value_heads": key_heads,
            "head_dim": 32, "query_pre_attn_scalar": 32, "initializer_range": std,
        }  # fmt: skip
    return FlorenzConfig.reduced(
        "0.4B" if decoder == "scratch" else "3.5B",
        layers=size.layers, width=size.width, vocab_size=words, encoder_vocab_size=prompt_words,
        vision_config=vision, encoder={**bart, **calm}, decoder=own,
    )  # fmt: skip
