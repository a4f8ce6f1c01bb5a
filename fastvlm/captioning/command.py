"""``python -m fastvlm caption``: checks its arguments, then a few photos or a job."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

import fastvlm
from fastvlm.captioning import arguments, models, photos
from fastvlm.captioning.captioner import Captioner
from fastvlm.captioning.job import Job, JobError, Output, Summary
from fastvlm.captioning.ledger import LedgerError
from fastvlm.captioning.models import Loaded
from fastvlm.captioning.processes import Processes
from fastvlm.captioning.sources import Source
from fastvlm.captioning.tasks import Question, questions, split
from fastvlm.decoding.languages import LANGUAGES
from fastvlm.demo.arguments import UsageError

_ONLY_WITH_OUT = ("resume", "retry", "txt", "draw", "webdataset", "report", "batch_size", "quiet")


def run(args: argparse.Namespace) -> int:
    """With parsed arguments (`fastvlm.captioning.arguments`); returns the exit code."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    if args.small and args.model is not None:
        raise UsageError("--small", "no --model beside it", args.model)
    if args.tokenizer is not None and args.model is None:
        raise UsageError("--tokenizer", "--model beside it", args.tokenizer)
    if args.out is None:
        if args.sources:
            raise UsageError("SOURCE", "--out beside it (a few photos: --image)", args.sources[0])
        for name in _ONLY_WITH_OUT:
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')}", "--out beside it", "none")
        languages = _languages(arguments.LANGUAGE_CODES if args.lang is None else args.lang)
        return photos.run(args, languages, lambda: _load(args, args.device))
    return _job(args)


def _languages(text: str) -> list[str]:
    codes = [code.strip() for code in text.split(",") if code.strip()]
    if not codes or not set(codes) <= set(LANGUAGES):
        raise UsageError("--lang", f"some of {','.join(LANGUAGES)}", repr(text))
    return codes


def _load(args: argparse.Namespace, device: str) -> Loaded:
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        return models.random(args.small, device, dtype)
    return models.pretrained(args.model, args.tokenizer, device, dtype)


def _asked(args: argparse.Namespace, languages: list[str] | None, florenz: bool) -> list[Question]:
    try:
        return questions(args.tasks or ["<CAPTION>"], languages, names_target=florenz)
    except ValueError as error:
        raise UsageError("--task", *str(error).split("; got ", 1)) from None


def _job(args: argparse.Namespace) -> int:
    for given, name in ((args.json, "--json"), (args.image, "--image")):
        if given:
            raise UsageError(name, "no --out beside it", args.out)
    for task in args.tasks or ():
        try:
            split(task)
        except ValueError as error:
            raise UsageError("--task", *str(error).split("; got ", 1)) from None
    if not args.sources:
        raise UsageError("SOURCE", "a folder, pictures or shards beside --out", "none")
    languages = None if args.lang is None else _languages(args.lang)
    source = Source(args.sources)
    processes = Processes()
    if next(source.items(), None) is None:
        raise UsageError("SOURCE", "something with a picture in it", ", ".join(args.sources))
    device = f"cuda:{processes.local_rank}" if args.device == "cuda" else args.device
    loaded = _load(args, device)
    florenz = loaded.model.config.model_type == "florenz"
    if florenz and languages is None:
        raise UsageError("--lang", "languages, which a Florenz model is told", "none")
    asked = _asked(args, languages, florenz)
    retry, resume = args.retry, args.resume or args.retry
    output = Output(Path(args.out), loaded.id, loaded.revision, resume, retry)
    output.check()
    fastvlm.patch(loaded.model)
    told = processes.rank == 0 and not args.quiet
    if not loaded.real and processes.rank == 0:
        print(models.RANDOM, file=sys.stderr)
    captioner = Captioner(
        loaded.model,
        loaded.processor,
        tasks=list(dict.fromkeys(question.name for question in asked)),
        languages=languages,
        tokenizer=loaded.tokenizer,
        num_beams=args.beams,
        max_new_tokens=args.new_tokens,
        keep_prefix=args.keep_prefix,
        batch_size=args.batch_size,
        workers=args.workers,
        linger=1.0,
    )
    try:
        with _stopped_politely(), captioner, processes:
            summary = Job(source, asked, captioner, output, (), told).run(processes)
            _tell(summary, processes, args.out)
    except (LedgerError, JobError) as error:
        print(f"fastvlm caption: {error}; {_go_on(args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastvlm caption: stopped; {_go_on(args.out)}", file=sys.stderr)
        return 130
    return 0


def _go_on(out: str) -> str:
    return f"what {out} holds is whole, and --resume goes on with it"


def _tell(summary: Summary, processes: Processes, out: str) -> None:
    pictures, failed, before = processes.total(summary.pictures, summary.failed, summary.before)
    if processes.rank:
        return
    rate = pictures / summary.seconds if summary.seconds else 0.0
    text = f"{out}: {pictures} photos in {summary.seconds:.1f} s, {rate:.2f} a second"
    text += f", {before} done before" if before else ""
    text += f", {failed} could not be read or described (their lines say why)" if failed else ""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _stopped_politely() -> Iterator[None]:
    """SIGTERM, by which clusters take machines back, ends as Ctrl-C does: what is done is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
