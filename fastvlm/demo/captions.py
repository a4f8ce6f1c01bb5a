"""``python -m fastvlm caption``: photos described in several languages by a patched model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch

import fastvlm
from fastvlm.decoding.languages import LANGUAGES
from fastvlm.demo import captioner
from fastvlm.demo.arguments import UsageError
from fastvlm.demo.workload import load_photo
from fastvlm.tables import text_table

RANDOM = "The weights are random, so the text means nothing. With --model real weights write it."


def _languages(text: str) -> list[str]:
    codes = [code.strip() for code in text.split(",") if code.strip()]
    if not codes or not set(codes) <= set(LANGUAGES):
        raise UsageError("--lang", f"some of {','.join(LANGUAGES)}", repr(text))
    return codes


def run(args: argparse.Namespace) -> int:
    """With parsed arguments (`fastvlm.demo.caption_arguments`); returns the exit code."""
    languages = _languages(args.lang)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    if args.small and args.model is not None:
        raise UsageError("--small", "no --model beside it", args.model)
    if args.tokenizer is not None and args.model is None:
        raise UsageError("--tokenizer", "--model beside it", args.tokenizer)
    photos, names = zip(*(load_photo(path) for path in args.image or [None]))
    if args.model is None:
        told = captioner.random(args.small, args.device)
    else:
        told = captioner.pretrained(args.model, args.tokenizer, args.device)
    fastvlm.patch(told.model)
    captions = fastvlm.caption(
        told.model,
        told.processor,
        list(photos),
        languages,
        tokenizer=told.tokenizer,
        prompt=args.prompt,
        num_beams=args.beams,
        max_new_tokens=args.new_tokens,
        keep_prefix=args.keep_prefix,
    )
    if not told.real:
        print(RANDOM, file=sys.stderr)
    if args.json:
        figures = {
            "model": told.name,
            "weights": "real" if told.real else "random",
            "captions": [{**asdict(c), "image": names[c.image]} for c in captions],
        }
        print(json.dumps(figures, indent=1, ensure_ascii=False))
        return 0
    rows = [(names[c.image], c.language, f"{c.score:.3f}", c.text) for c in captions]
    print(f"{told.name}, {'real' if told.real else 'random'} weights, {args.beams} beams\n")
    print(text_table(("image", "language", "score", "text"), rows))
    return 0
