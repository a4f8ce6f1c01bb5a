"""A folder's captions: what is asked about each picture, line by line, taken up anywhere."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm.captioning.answers import Answer
from fastvlm.captioning.batch_size import give_back
from fastvlm.captioning.captioner import Captioner, ModelError
from fastvlm.captioning.ledger import Done, Ledger, LedgerError, parts_of, rewrite
from fastvlm.captioning.lines import Line, answered, failed, reason_of
from fastvlm.captioning.processes import Processes
from fastvlm.captioning.progress import Progress
from fastvlm.captioning.sources import Item, Source
from fastvlm.captioning.tasks import Question
from fastvlm.usage import UsageError

# as many failures of the model, and nothing that went well: it is not the pictures
_HOPELESS = 3
# pictures, between two times that the memory of freed pixels goes back to the system
_GIVE_BACK_EVERY = 64
# called with each picture, its answers and their questions before the line is written
Beside = Callable[[Item, Sequence[Question], Sequence[Answer]], None]


class JobError(Exception):
    """The job cannot go on; what is written stays, and --resume takes it up."""


@dataclass
class Output:
    """Where lines go, and what earlier runs left there.

    UsageError: something is there and resume is False, or it is of another model.
    """

    path: Path
    model: str
    revision: str | None
    resume: bool = False
    retry: bool = False

    def check(self) -> None:
        """Before anything costs time."""
        there = [path for path in (str(self.path), *parts_of(self.path)) if os.path.exists(path)]
        if there and not self.resume:
            wanted = "a file that is not there yet, or --resume to go on with it"
            raise UsageError("--out", wanted, there[0])
        if self.path.is_dir():
            raise UsageError("--out", "a file", f"{self.path}, a folder")
        if not self.path.parent.is_dir():
            raise UsageError("--out", "a file in a folder that is there", str(self.path))
        models = Done(retry=False)
        for path in there:
            models.read(path)
        other = models.models - {(self.model, self.revision)}
        if other:
            found = ", ".join(f"{name} ({revision})" for name, revision in sorted(other, key=str))
            wanted = f"a file by this model, {self.model} ({self.revision})"
            raise UsageError("--out", wanted, f"{self.path}, by {found}")

    def open(self, processes: Processes) -> tuple[Ledger, Done, Ledger | None]:
        """The file of this process, what is done already, and, of several, the lock on the whole.

        Rank 0 puts what several processes left into one file first.
        """
        # nobody makes the file before the last one has seen that it is not there
        processes.wait_for_all()
        lock = None
        done = Done(self.retry)
        if processes.rank == 0:
            lock = Ledger(self.path)
            parts = parts_of(self.path)
            if parts or self.retry:
                rewrite(self.path, [self.path, *parts], keep_errors=not self.retry)
                lock.close()
                lock = Ledger(self.path)
                for part in parts:
                    os.unlink(part)
        processes.wait_for_all()
        end = done.read(self.path)
        if processes.world == 1:
            assert lock is not None
            lock.cut(end)
            return lock, done, None
        part = f"{self.path}.part-{processes.rank:05}-of-{processes.world:05}"
        return Ledger(part), done, lock

    def merge(self, processes: Processes) -> None:
        """After the last process has written its last line."""
        processes.wait_for_all()
        if processes.world > 1 and processes.rank == 0:
            parts = parts_of(self.path)
            rewrite(self.path, [self.path, *parts], keep_errors=True)
            for part in parts:
                os.unlink(part)
        processes.wait_for_all()


@dataclass
class Summary:
    """What a run did, in pictures; before: those that were done when it began."""

    pictures: int = 0
    failed: int = 0
    before: int = 0
    seconds: float = 0.0
    points: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Job:
    """Questions about all pictures of a source, answered by a captioner into an output."""

    source: Source
    questions: Sequence[Question]
    captioner: Captioner
    output: Output
    beside: Sequence[Beside] = ()
    show: bool = True

    def run(self, processes: Processes) -> Summary:
        """UsageError, LedgerError, JobError, KeyboardInterrupt: the output holds what was done."""
        ledger, self._done, lock = self.output.open(processes)
        self._processes = processes
        self._summary = Summary()
        self._pending: deque[tuple[Item, list[Question], Future[list[Answer]]]] = deque()
        self._hopeless = self._since_given_back = 0
        show = self.show and processes.rank == 0
        self._progress = Progress(show, self._count)
        try:
            for item, wanted in self._items(self._progress.say):
                if not wanted:
                    self._summary.before += 1
                    continue
                self._write(ledger, least=0)
                future = self.captioner.submit(item.read, questions=wanted)
                self._pending.append((item, wanted, future))
            self._write(ledger, least=len(self._pending))
        except BaseException as error:
            # what is done is kept, what is not is let go
            if not isinstance(error, (LedgerError, JobError)):
                self._write(ledger, least=0)
            for _, _, future in self._pending:
                future.cancel()
            raise
        finally:
            self._progress.close()
            ledger.close()
        self.output.merge(processes)
        if lock is not None:
            lock.close()
        self._summary.seconds = self._progress.seconds
        self._summary.points = self._progress.points
        return self._summary

    def _count(self) -> Iterator[Item]:
        return (item for item, wanted in self._items(lambda text: None) if wanted)

    def _items(self, warn: Callable[[str], None]) -> Iterator[tuple[Item, list[Question]]]:
        """This process's pictures with the questions about them that have no answer yet."""
        seen = Done(retry=False)
        for item in self.source.items(self._processes.rank, self._processes.world, warn):
            if self.source.shards and not seen.add(item.path):
                warn(f"{item.file}: another sample is called {item.path}; this one is left out")
                continue
            wanted = [
                q for q in self.questions if (item.path, q.name, q.language) not in self._done
            ]
            yield item, wanted

    def _write(self, ledger: Ledger, least: int) -> None:
        """The lines of the first least pictures, and of those behind them that are done by now."""
        lines: list[Line] = []
        pictures = 0
        while self._pending and (pictures < least or self._pending[0][2].done()):
            item, wanted, future = self._pending.popleft()
            if lines and not future.done():
                self._append(ledger, lines, pictures)
                least, lines, pictures = least - pictures, [], 0
            lines += self._lines(item, wanted, future)
            pictures += 1
        self._append(ledger, lines, pictures)

    def _append(self, ledger: Ledger, lines: list[Line], pictures: int) -> None:
        if lines:
            ledger.append(lines)
            self._summary.pictures += pictures
            self._progress.step(pictures)
            self._since_given_back += pictures
            if self._since_given_back >= _GIVE_BACK_EVERY:
                self._since_given_back = 0
                give_back()

    def _lines(
        self, item: Item, wanted: list[Question], future: Future[list[Answer]]
    ) -> list[Line]:
        by = {"model": self.output.model, "revision": self.output.revision}
        try:
            answers = future.result()
        except Exception as error:
            self._judge(error)
            self._summary.failed += 1
            self._progress.say(f"{item.path}: {reason_of(error)}")
            return failed(item.path, wanted, error, by)
        self._hopeless = -1
        try:
            for beside in self.beside:
                beside(item, wanted, answers)
        except OSError as error:
            raise JobError(f"{error.filename or item.path}: {error.strerror}") from error
        return answered(item.path, answers, by)

    def _judge(self, error: Exception) -> None:
        if not isinstance(error, ModelError) or self._hopeless < 0:
            return
        self._hopeless += 1
        if self._hopeless >= _HOPELESS:
            raise JobError(f"the model failed on each of the first pictures: {error}") from error
