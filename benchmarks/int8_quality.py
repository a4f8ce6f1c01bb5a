"""What int8 arithmetic costs a model that was really trained: losses and captions, with it and
without, as the model is and with channels planted that are many times as large as the others.

``python -m benchmarks.int8_quality FOLDER``, of ``python -m fastvlm florenz train``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastvlm
from fastvlm import env
from fastvlm.tables import text_table

RESULTS = Path(__file__).resolve().parent / "results"
FACTOR, CHANNELS = 30.0, 2
SIDES: dict[str, dict[str, str]] = {
    "float32": {},
    "compute int8": {"compute": "int8"},
    "weights and compute int8": {"weights": "int8", "compute": "int8"},
}


@torch.no_grad()
def plant(model: nn.Module, factor: float = FACTOR, channels: int = CHANNELS) -> int:
    """Make some channels of what linear layers read `factor` times as large, and scale them back in
    the layer that reads them: the function is as it was. Returns how many places there were."""
    places = 0
    for module in model.modules():
        for norm, reader in _normed(module):
            norm.weight[:channels] *= factor
            norm.bias[:channels] *= factor
            reader.weight[:, :channels] /= factor
            places += 1
        for values, reader in _attended(module):
            for of_values in (values.weight, values.bias):
                if of_values is not None:
                    of_values[-reader.in_features :][:channels] *= factor
            reader.weight[:, :channels] /= factor
            places += 1
    return places


def _normed(module: Any) -> list[tuple[Any, Any]]:
    """Norms whose output one linear layer reads, and nothing else: of half a block of DaViT."""
    if not (hasattr(module, "norm1") and hasattr(module, "ffn")):
        return []
    attention = getattr(module, "window_attn", None) or module.channel_attn
    return [(module.norm1, attention.qkv), (module.norm2, module.ffn.fc1)]


def _attended(module: Any) -> list[tuple[Any, Any]]:
    """What an attention weighs, and the layer behind it: the values come last in a common layer."""
    if hasattr(module, "window_size") and hasattr(module, "qkv"):
        return [(module.qkv, module.proj)]
    out = getattr(module, "out_proj", getattr(module, "o_proj", None))
    values = getattr(module, "v_proj", None)
    if values is None or out is None or values.out_features != out.in_features:
        return []
    return [(values, out)]


class Trained:
    """A run of ``florenz train``, and pictures that it has not seen."""

    def __init__(self, folder: Path, scenes: int) -> None:
        from fastvlm.florenz.training.batches import Words
        from fastvlm.florenz.training.emergence import held_out
        from fastvlm.florenz.training.sizes import SIZES
        from fastvlm.florenz.training.tokenizers import prompt_tokenizer, text_tokenizer
        from fastvlm.loading.processors import square

        settings = json.loads((folder / "settings.json").read_text())
        self.folder, self.name = folder, settings["size"]
        self.words = Words(prompt_tokenizer(), text_tokenizer())
        self.size = SIZES[settings["size"]]
        self.processor = square(self.words.prompts, self.size.pixels)
        self.shown = held_out(self.size, scenes)

    def model(self, planted: bool) -> Any:
        from fastvlm.florenz import FlorenzForConditionalGeneration

        model = FlorenzForConditionalGeneration.from_pretrained(self.folder).eval()
        if planted and plant(model) == 0:
            raise ValueError(f"{self.folder}: no place for a large channel")
        return model

    def losses(self, model: Any) -> dict[str, float]:
        from fastvlm.florenz.training.emergence import losses

        return losses(model, self.words, self.size, self.shown)

    def captions(self, model: Any) -> list[str]:
        from fastvlm.florenz.training.emergence import SEEN, captions

        rows = captions(model, self.processor, self.words.texts, self.shown, SEEN, prefix=False)
        return [text for row in rows for text in row]


def measure(trained: Trained) -> list[dict[str, Any]]:
    cases = []
    for planted in (False, True):
        found: dict[str, Any] = {}
        for side, settings in SIDES.items():
            model = trained.model(planted)
            fastvlm.patch(model, **settings)  # type: ignore[arg-type]
            found[side] = trained.losses(model), trained.captions(model)
        losses, texts = found["float32"]
        for side in SIDES:
            if side == "float32":
                continue
            now, said = found[side]
            cases.append({
                "planted": f"{CHANNELS} channels x {FACTOR:g}" if planted else "nothing",
                "side": side,
                "loss": losses,
                "loss_change": {name: now[name] / losses[name] - 1 for name in losses},
                "captions": len(texts),
                "equal_captions": sum(a == b for a, b in zip(texts, said)) / max(1, len(texts)),
            })  # fmt: skip
    return cases


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_quality")
    parser.add_argument("folder", type=Path, help="of python -m fastvlm florenz train")
    parser.add_argument("--scenes", type=int, default=100, help="default 100")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    args = parser.parse_args(argv)
    trained = Trained(args.folder, args.scenes)
    cases = measure(trained)
    path = args.out / "int8-quality.json"
    path.write_text(
        json.dumps({**env.stamp(), "model": f"florenz train --size {trained.name}", "cases": cases},
                   indent=1) + "\n"
    )  # fmt: skip
    rows = [
        (
            case["planted"], case["side"],
            *(f"{change:+.2%}" for change in case["loss_change"].values()),
            f"{case['equal_captions']:.1%}",
        )
        for case in cases
    ]  # fmt: skip
    headers = ("planted", "side", *cases[0]["loss"], "equal captions")
    print(f"{text_table(headers, rows)}\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
