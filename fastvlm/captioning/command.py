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

from fastvlm.captioning import arguments, models, photos
from fastvlm.captioning.batch_size import MOST_ON_CPU, MOST_ON_GPU
from fastvlm.captioning.captioner import Captioner
from fastvlm.captioning.draw import Drawings
from fastvlm.captioning.job import Beside, Job, JobError, Output, Summary
from fastvlm.captioning.ledger import LedgerError
from fastvlm.captioning.models import Loaded
from fastvlm.captioning.processes import Processes
from fastvlm.captioning.report_page import write_page
from fastvlm.captioning.shards import write_shards
from fastvlm.captioning.sources import Source
from fastvlm.captioning.tasks import Question, questions, split
from fastvlm.captioning.texts import Texts
from fastvlm.decoding.languages import LANGUAGES
from fastvlm.usage import UsageError

_ONLY_WITH_OUT = ("resume", "retry", "txt", "draw", "webdataset", "report", "batch_size", "quiet")


def run(args: argparse.Namespace) -> int:
    """With parsed arguments (`fastvlm.captioning.arguments`); returns the exit code."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "a device that is there", "cuda (PyTorch sees no GPU)")
    arguments.check_bits(args)
    if args.small and args.model is not None:
        raise UsageError("--small", "no --model beside it", args.model)
    for name in ("tokenizer", "processor"):
        if getattr(args, name) is not None and args.model is None:
            raise UsageError(f"--{name}", "--model beside it", getattr(args, name))
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
    return models.pretrained(args.model, args.tokenizer, device, dtype, args.processor)


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
    if args.txt and source.shards:
        raise UsageError("--txt", "a folder or pictures (of shards: --webdataset)", args.sources[0])
    for name, folder in (("--draw", args.draw), ("--webdataset", args.webdataset)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise UsageError(name, "a folder", f"{folder}, a file")
    if args.report is not None and not Path(args.report).parent.is_dir():
        raise UsageError("--report", "a file in a folder that is there", args.report)
    processes = Processes()
    if next(source.items(), None) is None:
        raise UsageError("SOURCE", "something with a picture in it", ", ".join(args.sources))
    device = f"cuda:{processes.local_rank}" if args.device == "cuda" else args.device
    loaded = _load(args, device)
    florenz = loaded.model.config.model_type == "florenz"
    if florenz and languages is None:
        raise UsageError("--lang", "languages, which a Florenz model is told", "none")
    asked = _asked(args, languages, florenz)
    loaded = arguments.patched(args, loaded)
    retry, resume = args.retry, args.resume or args.retry
    output = Output(Path(args.out), loaded.id, loaded.revision, resume, retry)
    output.check()
    told = processes.rank == 0 and not args.quiet
    beside: list[Beside] = []
    if args.txt:
        beside.append(Texts(asked, lambda text: print(text, file=sys.stderr)))
    if args.draw is not None:
        beside.append(Drawings(args.draw))
    if not loaded.real and processes.rank == 0:
        print(models.RANDOM, file=sys.stderr)
    kept = arguments.features(args, loaded)
    captioner = Captioner(
        loaded.model,
        loaded.processor,
        tasks=list(dict.fromkeys(question.name for question in asked)),
        languages=languages,
        tokenizer=loaded.tokenizer,
        num_beams=args.beams,
        max_new_tokens=args.new_tokens,
        keep_prefix=args.keep_prefix,
        features=kept,
        batch_size=args.batch_size,
        workers=args.workers,
        # twice what decodes together: the next batch is open when one ends
        most_waiting=2
        * (args.batch_size or (MOST_ON_CPU if args.device == "cpu" else MOST_ON_GPU)),
        linger=1.0,
    )
    try:
        with _stopped_politely(), captioner, processes:
            summary = Job(source, asked, captioner, output, beside, told).run(processes)
            total = _total(summary, processes)
        if processes.rank == 0:
            _finish(args, source, loaded, total)
    except OSError as error:
        print(f"fastvlm caption: {error}; {_go_on(args.out)}", file=sys.stderr)
        return 1
    except (LedgerError, JobError) as error:
        print(f"fastvlm caption: {error}; {_go_on(args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastvlm caption: stopped; {_go_on(args.out)}", file=sys.stderr)
        return 130
    return 0


def _go_on(out: str) -> str:
    return f"what {out} holds is whole, and --resume goes on with it"


def _total(summary: Summary, processes: Processes) -> Summary:
    """Of all processes; seconds and points are this one's."""
    pictures, failed, before = processes.total(summary.pictures, summary.failed, summary.before)
    share = pictures / summary.pictures if summary.pictures else 1.0
    points = [(at, round(done * share)) for at, done in summary.points]
    return Summary(pictures, failed, before, summary.seconds, points)


def _finish(args: argparse.Namespace, source: Source, loaded: Loaded, total: Summary) -> None:
    """What is made of the whole output, and the last line on stderr."""
    rate = total.pictures / total.seconds if total.seconds else 0.0
    text = f"{args.out}: {total.pictures} photos in {total.seconds:.1f} s, {rate:.2f} a second"
    text += f", {total.before} done before" if total.before else ""
    if total.failed:
        text += f", {total.failed} could not be read or described (their lines say why)"
    out = Path(args.out)
    if args.webdataset is not None:
        samples = write_shards(source, out, Path(args.webdataset))
        text += f"; {samples} samples in {args.webdataset}"
    if args.report is not None:
        facts = {"photos a second": f"{rate:.2f}", "model": loaded.id}
        if not loaded.real:
            facts["weights"] = "random: the text means nothing"
        write_page(Path(args.report), source, out, facts, total.points)
        text += f"; {args.report}"
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
