"""The figures of arXiv 2503.09443 (version 1, tables 4, 9, 10 and 13) for the sets read here.

X is the mean of the four languages of CoMMuTE, unseen that of French, Spanish, Russian and Chinese
of Crossmodal-3600; of Multi30K's translations figures are means of three splits. Before fine-tuning
the paper gives CLIPScore for captions in English, and CIDEr with the prefix for unseen languages.
100K, 30K: steps of pre-training, 10K elsewhere.
"""

from __future__ import annotations

MEANS = {"commute": {"X": ("de", "fr", "ru", "zh")}, "xm3600": {"unseen": ("fr", "es", "ru", "zh")}}
FINE_TUNED, BEFORE = "fine-tuned", "before fine-tuning"

Column = tuple[str, str, str]  # set, metric, language
_COLUMNS: dict[str, tuple[Column, ...]] = {
    FINE_TUNED: (
        ("multi30k-translation", "BLEU", "de"), ("multi30k-translation", "BLEU", "fr"),
        ("commute", "BLEU", "de"), ("commute", "BLEU", "X"),
        ("commute", "accuracy", "de"), ("commute", "accuracy", "X"),
        ("coco", "CIDEr", "en"), ("multi30k", "CIDEr", "en"), ("multi30k", "CIDEr", "de"),
        ("xm3600", "CIDEr", "en"), ("xm3600", "CIDEr", "de"), ("xm3600", "CIDEr", "unseen"),
    ),
    BEFORE: (
        ("multi30k-translation", "BLEU", "de"), ("multi30k-translation", "BLEU", "fr"),
        ("commute", "BLEU", "de"), ("commute", "BLEU", "X"),
        ("commute", "accuracy", "de"), ("commute", "accuracy", "X"),
        ("coco", "CLIPScore", "en"), ("multi30k", "CLIPScore", "en"),
        ("xm3600", "CLIPScore", "en"), ("xm3600", "CIDEr", "unseen"),
    ),
}  # fmt: skip
_ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    FINE_TUNED: {
        "0.4B": (37.7, 53.7, 26.5, 20.8, 59.0, 56.6, 138.2, 76.6, 77.4, 76.9, 38.6, 40.0),
        "0.4B, 100K": (39.9, 57.2, 32.8, 26.6, 59.7, 59.8, 140.3, 79.5, 79.2, 78.3, 39.3, 42.0),
        "1.0B": (38.4, 56.6, 29.0, 22.8, 59.7, 58.8, 142.8, 85.1, 82.6, 78.0, 41.2, 44.7),
        "3.5B": (39.2, 56.9, 32.0, 26.0, 61.3, 62.6, 141.6, 81.8, 84.5, 77.7, 38.2, 43.7),
        "11.2B": (40.7, 59.1, 36.8, 29.6, 62.3, 63.9, 141.3, 83.1, 90.7, 79.3, 39.4, 46.3),
        "11.2B, 30K": (41.7, 59.6, 38.5, 31.2, 62.0, 63.4, 140.8, 83.4, 89.4, 78.1, 41.8, 46.9),
    },
    BEFORE: {
        "0.4B": (34.1, 44.3, 34.1, 25.9, 54.0, 53.6, 77.7, 77.9, 74.8, 1.7),
        "0.4B, 100K": (36.1, 51.0, 37.2, 29.5, 54.0, 54.2, 77.9, 78.2, 75.4, 1.8),
        "1.0B": (35.3, 47.4, 35.4, 27.1, 54.7, 54.1, 79.9, 80.2, 77.0, 5.6),
        "3.5B": (35.8, 48.3, 36.7, 28.7, 53.0, 54.3, 78.5, 78.7, 75.9, 24.1),
        "11.2B": (36.6, 50.9, 39.5, 29.8, 52.7, 53.5, 78.9, 79.0, 76.3, 26.6),
        "11.2B, 30K": (37.6, 52.3, 39.4, 30.4, 52.0, 53.2, 79.0, 79.2, 76.6, 17.7),
    },
}  # fmt: skip
# table 13: its row of 11.2B after 30K steps repeats that of 11.2B, and is left out
_XM3600 = {
    "0.4B": (55.4, 54.9, 26.0, 23.7), "1.0B": (64.6, 59.6, 30.3, 24.2),
    "3.5B": (61.0, 59.8, 30.0, 24.0), "11.2B": (64.1, 61.6, 34.3, 25.3),
}  # fmt: skip

# tables 9 and 10, before fine-tuning: BLEU and accuracy in German, French, Russian and Chinese
_COMMUTE = {
    "1.0B": ((35.4, 32.4, 14.2, 26.2), (54.7, 54.5, 51.9, 55.2)),
    "3.5B": ((36.7, 36.8, 14.6, 26.9), (53.0, 54.9, 54.0, 55.2)),
    "11.2B": ((39.5, 37.5, 16.1, 26.3), (52.7, 52.9, 54.0, 54.3)),
}  # fmt: skip


def paper_rows(set_name: str) -> dict[str, dict[tuple[str, str], float]]:
    """By model and stage, the paper's figures of a set by (metric, language); empty for the small
    world, which is not the paper's."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for stage, columns in _COLUMNS.items():
        for model, row in _ROWS[stage].items():
            figures = {
                (metric, language): value
                for (name, metric, language), value in zip(columns, row, strict=True)
                if name == set_name
            }
            if set_name == "xm3600" and stage == FINE_TUNED and model in _XM3600:
                codes = MEANS["xm3600"]["unseen"]
                figures.update(
                    (("CIDEr", c), v) for c, v in zip(codes, _XM3600[model], strict=True)
                )
            if set_name == "commute" and stage == BEFORE and model in _COMMUTE:
                codes = MEANS["commute"]["X"]
                for metric, values in zip(("BLEU", "accuracy"), _COMMUTE[model], strict=True):
                    figures.update(((metric, c), v) for c, v in zip(codes, values, strict=True))
            if figures:
                found[f"paper, {model}, {stage}"] = figures
    return found
