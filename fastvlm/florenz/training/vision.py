"""A vision tower to begin with: it learns to name what a picture shows, before any text.

The paper's tower is Florence-2's, frozen. For the small world there is none, so one is trained on
labels of scenes, and then frozen too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fastvlm.florenz.training.batches import pixels_of, scene_at
from fastvlm.florenz.training.sizes import Size
from fastvlm.florenz.world.scene import (
    COLOURS,
    KINDS,
    MOST,
    OPPOSITE,
    PLACES,
    RELATIONS,
    Scene,
    Variety,
    draw_scene,
)
from fastvlm.florenz.world.scene import SIZES as GROUP_SIZES

_DRAWN = 1024
_PLACE_STD = 0.3  # of a position's embedding beside features of variance 1
FIRST = 32  # pictures that a tower is standardized on

_PARTS = (COLOURS, range(1, MOST + 1), (None, *GROUP_SIZES), (None, *RELATIONS))
# one label for each kind with each colour, count, size and side, and one for each place
LABELS = [(kind, part, value) for kind in KINDS for part in range(4) for value in _PARTS[part]]
LABELS += [(place, 4, True) for place in PLACES]
_PLACE_OF = {label: place for place, label in enumerate(LABELS)}


def labels_of(scene: Scene) -> Tensor:
    """float32 [len(LABELS)]: 1 for what the scene shows."""
    found = torch.zeros(len(LABELS))
    sides = (scene.relation, scene.relation and OPPOSITE[scene.relation])
    for group, side in zip(scene.groups, sides):
        for part, value in enumerate((group.colour, group.count, group.size, side)):
            found[_PLACE_OF[group.kind, part, value]] = 1
    if scene.place is not None:
        found[_PLACE_OF[scene.place, 4, True]] = 1
    return found


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures with the labels of their scenes, none of which training writes about."""

    def __init__(self, size: Size, count: int, seed: int) -> None:
        self.size, self.count, self.seed = size, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene, picture, _ = scene_at(self.seed, "pictures", index, self.size)
        return pixels_of(picture), labels_of(scene)


def picture_batch(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pixels, labels = zip(*rows)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def _shares(variety: Variety) -> Tensor:
    """How often each label holds, of many scenes, and no label always or never."""
    chance = random.Random("shares")
    found = torch.stack([labels_of(draw_scene(chance, variety)) for _ in range(_DRAWN)])
    return found.mean(0).clamp(1 / _DRAWN, 1 - 1 / _DRAWN)


class Namer(nn.Module):
    """Vision tower and projector of a model, and a head: a label holds where any position says so.

    They are the model's own modules: training this trains them.
    """

    def __init__(self, model: Any, variety: Variety) -> None:
        super().__init__()
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector
        self.head = nn.Linear(model.config.vision_config.projection_dim, len(LABELS))
        # the head knows how often a label holds: a tower that has to learn it forgets the picture
        self.head.bias.data.copy_(torch.logit(_shares(variety)))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """loss: summed over labels, a mean over pictures. logits [I, len(LABELS)]."""
        logits = self.head(self.features(pixel_values)).amax(1)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return {"loss": loss / labels.shape[0], "logits": logits}

    def features(self, pixel_values: Tensor) -> Tensor:
        """[I, 1 + positions, width]: what the encoder reads of pictures."""
        found: Tensor = self.projector(self.tower(pixel_values).last_hidden_state)
        return found

    @torch.no_grad()
    def standardize(self, pixel_values: Tensor) -> None:
        """Scale and shift the weights so that pictures differ from the first step on.

        Of a plain ground, position and time embeddings, tower and projector make features of which
        a fiftieth of the variance is the picture's. Each stage's convolution then has mean 0 and
        variance 1 over these pictures in every channel (data-dependent initialization, arXiv
        1511.06856, without its balancing of rates), and the embeddings take what is constant away.
        """
        states = pixel_values
        for embed, blocks in zip(self.tower.convs, self.tower.blocks, strict=True):
            found = _convolved(embed, states)
            mean, std = found.mean((0, 2, 3)), found.std((0, 2, 3))
            embed.conv.weight.div_(std.view(-1, 1, 1, 1))
            embed.conv.bias.sub_(mean).div_(std)
            states = embed(states)
            for block in blocks:
                states = block(states)
        mean = states.mean((0, 2, 3))
        std = (states - mean.view(-1, 1, 1)).std()
        positions = self.projector.image_position_embed
        tables = (positions.column_embeddings.weight, positions.row_embeddings.weight)
        constant = mean + self.projector.visual_temporal_embed.pos_idx_to_embed[0]
        for table, part in zip(tables, constant.split([t.shape[1] for t in tables]), strict=True):
            table.mul_(_PLACE_STD * std / table.std()).sub_(part)
        self.projector.image_projection.weight.div_(std)


def _convolved(embed: Any, states: Tensor) -> Tensor:
    """What the convolution of a stage gives, before the norm that may follow."""
    seen: list[Tensor] = []
    hook = embed.conv.register_forward_hook(lambda *call: seen.append(call[2]))
    embed(states)
    hook.remove()
    return seen[0]
