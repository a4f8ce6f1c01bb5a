"""fastvlm.Captioner: pictures from any thread, answers as futures, what waits decodes together."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full
from types import TracebackType
from typing import Any

import torch

from fastvlm.captioning.answers import Answer, Reader
from fastvlm.captioning.batch_size import BatchSize, out_of_memory
from fastvlm.captioning.requests import Deadline, Ready, Request, Waiting
from fastvlm.captioning.stream import Stream
from fastvlm.captioning.tasks import Question, questions
from fastvlm.checks import fail
from fastvlm.decoding.images import as_image, pixels_of
from fastvlm.decoding.pictures import PictureError, open_picture
from fastvlm.decoding.writer import Asked, Writer, Written
from fastvlm.features.kept import VisionFeatures, features_of
from fastvlm.generate.feed import Arrival, CannotJoin

OP = "Captioner"


class ModelError(RuntimeError):
    """The model failed on one picture alone; the text says how."""


class Captioner:
    """Answers about pictures, from any number of threads, batched as they come.

    ``submit(picture)`` returns a `concurrent.futures.Future` at once; a thread of its own runs the
    model on all that wait and were asked the same, workers open and resize pictures beside it. The
    answers are those of `fastvlm.caption`, whoever shares the batch.

    model, processor, tokenizer, prefixes, num_beams, keep_prefix, generate_kwargs: as for
        `fastvlm.caption`. The model is only used, not changed: `fastvlm.patch` it before.
    tasks: one or a list, of Florence-2's ("<OD>", "<OPEN_VOCABULARY_DETECTION>a cat", …) or text.
    languages: of the descriptions among them; None: as the model likes, without a prefix.
    max_new_tokens: None: as many as the longest of tasks takes.
    batch_size: pictures that decode together at most; None: as memory allows. Where it runs out the
        batch is halved and done again.
    most_waiting: pictures that may wait, their pixels decoded; beyond it submit() blocks.
    workers: threads that open pictures. linger: seconds to wait for pictures that are being opened
        when the batch is not full yet.
    features: as for `fastvlm.caption`.

    It is a context manager; `close` ends it. Of a patched model a picture joins what decodes as
    soon as sentences that have ended make room, and a cancelled or late one leaves at the next
    token; elsewhere (`why_batched`) a batch ends as a whole, and what comes meanwhile waits for
    the next. ValueError, TypeError: by argument.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        tasks: str | Sequence[str] = "<CAPTION>",
        languages: Sequence[str] | None = None,
        prefixes: Mapping[str, str] | None = None,
        tokenizer: Any = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        keep_prefix: bool = False,
        batch_size: int | None = None,
        most_waiting: int = 32,
        workers: int = 2,
        linger: float = 0.05,
        features: VisionFeatures | str | os.PathLike[str] | None = None,
        **generate_kwargs: Any,
    ) -> None:
        for name, value in (("most_waiting", most_waiting), ("workers", workers)):
            if not isinstance(value, int) or value < 1:
                raise fail(OP, name, "a whole number, 1 or more", value)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise fail(OP, "batch_size", "a whole number, 1 or more, or None", batch_size)
        if not isinstance(linger, (int, float)) or not 0 <= linger < float("inf"):
            raise fail(OP, "linger", "seconds, 0 or more", linger)
        florenz = getattr(getattr(model, "config", None), "model_type", None) == "florenz"
        self._languages, self._prefixes, self._names_target = languages, prefixes, florenz
        self.questions = self._asked(tasks, languages)
        if max_new_tokens is None:
            max_new_tokens = max(question.most_tokens for question in self.questions)
        self._writer = Writer(
            model,
            processor,
            tokenizer,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            generate_kwargs=generate_kwargs,
            op=OP,
        )
        self._image_processor = getattr(processor, "image_processor", None)
        self._features = features_of(features, model, processor)
        self._reader = Reader(self._writer, processor, keep_prefix)
        self._reader.check(self.questions)
        self._fixed, self._device = batch_size, torch.device(model.device)
        self._sizes: dict[int, BatchSize] = {}
        self._cannot_join: str | None = None  # what a loop has said of it
        self._linger = linger
        self._waiting = Waiting(most_waiting)
        self._openers = ThreadPoolExecutor(workers, thread_name_prefix="fastvlm-pictures")
        self._thread = threading.Thread(target=self._run, name="fastvlm-captioner", daemon=True)
        self._thread.start()
        # a thread that runs a model must not be alive when the interpreter takes things down
        ref = weakref.ref(self)

        def at_exit() -> None:
            if (one := ref()) is not None:
                one.close(cancel=True)

        self._at_exit = at_exit
        atexit.register(self._at_exit)

    def _asked(self, tasks: str | Sequence[str], languages: Any) -> tuple[Question, ...]:
        try:
            names = [tasks] if isinstance(tasks, str) else list(tasks)
            found = tuple(questions(names, languages, self._prefixes, self._names_target))
        except ValueError as error:
            if str(error).startswith("fastvlm."):
                raise
            raise ValueError(f"fastvlm.{OP}: tasks must be {error}") from None
        if not found:
            raise fail(OP, "tasks", "one task or more", tasks)
        return found

    def submit(
        self,
        picture: Any,
        *,
        tasks: str | Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        questions: Sequence[Question] | None = None,
        deadline: float | None = None,
        block: bool = True,
    ) -> Future[list[Answer]]:
        """A future of the answers, in the order of tasks and languages.

        picture: path, bytes of a file, open binary file, PIL image, uint8 array [H, W, 3] or
            floating pixel_values [3, H, W]; or a function that returns one, called in a worker.
        tasks, languages: of this picture, instead of the captioner's.
        questions: some of `Captioner.questions`, instead of tasks and languages.
        deadline: seconds from now. An answer that is not there then is a TimeoutError; it is looked
            at between steps.
        block: wait where most_waiting pictures wait already, until the deadline at most; otherwise
            queue.Full is raised.

        The future may be cancelled until its answer is there. Its error is a ValueError that says
        why, where picture is none, and a `ModelError` where the model fails on it alone.
        RuntimeError: after close().
        """
        if deadline is not None and not deadline > 0:
            raise fail(OP, "deadline", "seconds from now, above 0, or None", deadline)
        if questions is not None:
            asked = tuple(questions)
        elif tasks is None and languages is None:
            asked = self.questions
        else:
            names = [q.name for q in self.questions] if tasks is None else tasks
            asked = self._asked(names, self._languages if languages is None else languages)
            self._reader.check(asked)
        request = Request(picture, asked, Deadline.after(deadline))
        if not self._waiting.enter(request, block):
            raise Full(f"fastvlm.{OP}: {self._waiting.most} pictures wait already")
        try:
            self._openers.submit(self._open, request)
        except RuntimeError:  # closed in between
            self._waiting.leave(request)
            raise RuntimeError(f"fastvlm.{OP}: it is closed") from None
        return request.future

    def close(self, cancel: bool = False) -> None:
        """Take no more pictures, answer those that wait (cancel: drop them), end the threads."""
        atexit.unregister(self._at_exit)
        self._waiting.close(cancel)
        self._openers.shutdown(wait=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._features is not None:
            self._features.flush()

    def __enter__(self) -> Captioner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    @property
    def batch_limit(self) -> int:
        """The most pictures of the largest batch that may come next."""
        return max((size.limit for size in self._sizes.values()), default=self._fixed or 1)

    @property
    def why_batched(self) -> str | None:
        """Why a batch ends as a whole; None where pictures join what decodes already."""
        return self._cannot_join or self._writer.cannot_join()

    def _open(self, request: Request) -> None:
        """In a worker: the picture, its size, its pixel_values."""
        if request.over():
            self._waiting.leave(request)
            return
        try:
            ready = self._ready(request.picture)
        except Exception as error:
            self._waiting.leave(request)
            request.fail(error)
            return
        request.picture = None
        self._waiting.ready(request, ready)

    def _ready(self, picture: Any) -> Ready:
        if callable(picture):
            picture = picture()
        if isinstance(picture, (bytes, bytearray, memoryview)) or hasattr(picture, "read"):
            picture = _from_file(picture)
        image = as_image(picture, "picture")
        size = None if isinstance(image, torch.Tensor) else image.size
        if self._features is None:
            return Ready(pixels_of(image, self._image_processor), size)
        key = self._features.key(image)
        kept = self._features.read([key])
        if kept is not None:
            return Ready(kept[0], size)
        return Ready(pixels_of(image, self._image_processor), size, key)

    def _run(self) -> None:
        """The thread of the model."""
        while True:
            batch = self._waiting.take(self._limit, self._linger)
            if batch is None:
                return
            if self.why_batched is None:
                self._serve(batch)
            else:
                self._answer_all(batch)
            del batch

    def _size(self, asked: int) -> BatchSize:
        if asked not in self._sizes:
            self._sizes[asked] = BatchSize(self._fixed, self._device)
        return self._sizes[asked]

    def _limit(self, request: Request) -> int:
        return self._size(len(request.questions)).limit

    def _answer_all(self, batch: list[Request]) -> None:
        try:
            self._answer(batch)
        except BaseException as error:  # nobody may wait for an answer that never comes
            for request in batch:
                request.fail(error)
        for request in batch:
            request.opened = None  # whoever keeps the future does not keep the pixels

    def _serve(self, batch: list[Request]) -> None:
        """These, and what comes while they decode; once more as batches where that fails."""
        stream = Stream(self._writer, self._waiting, self._limit, self._encode, self._finish)
        try:
            stream.run(batch)
            return
        except Exception as error:
            # the frames of its traceback hold tensors, so it is let go of
            reason = f"{type(error).__name__}: {error}"
            no_memory = out_of_memory(error)
            if isinstance(error, CannotJoin):
                self._cannot_join = str(error)
        left: dict[Any, list[Request]] = {}
        for request in stream.left():
            left.setdefault((request.questions, request.open.kind), []).append(request)
        for size in {self._size(len(asked)) for asked, _ in left if no_memory}:
            size.halve()
        for again in left.values():
            self._answer_all(again)
        if not no_memory and self._cannot_join is None:
            text = f"pictures that decoded together are done again, in batches ({reason})"
            with contextlib.suppress(RuntimeWarning):  # as an error it would end this thread
                warnings.warn(f"fastvlm.{OP}: {text}", RuntimeWarning, stacklevel=2)

    def _pixels(self, batch: list[Request]) -> Any:
        pixels: Any = torch.stack([request.open.pixels for request in batch])
        if self._features is None:
            return pixels
        keys = [request.open.key for request in batch]
        return self._features.batch_of(pixels, [key for key in keys if key is not None])

    def _encode(self, batch: list[Request], together: int) -> list[Arrival]:
        """What these, asked the same, bring to a loop, where together pictures are with them. The
        model failed on one alone: it is told. MemoryError: there is none for them."""
        asked = batch[0].questions
        try:
            with self._size(len(asked)).measured(together, len(batch)):
                return [self._writer.arrival(self._pixels(batch), _rows(asked), batch)]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            no_memory = out_of_memory(error)
        if no_memory:
            raise MemoryError(reason)
        if len(batch) > 1:
            return [arrival for one in batch for arrival in self._encode([one], together)]
        batch[0].fail(_failed(reason))
        return []

    def _answer(self, batch: list[Request]) -> None:
        """One batch; in two halves where memory runs out, one by one where the model fails."""
        batch = [request for request in batch if not request.over()]
        if not batch:
            return
        asked = batch[0].questions
        size = self._size(len(asked))
        if len(batch) > size.limit:
            self._halves(batch)
            return

        def all_over() -> bool:
            self._waiting.expire()
            still = [request for request in batch if not request.over()]
            return not still

        try:
            with size.measured(len(batch)):
                written = self._writer.write(self._pixels(batch), _rows(asked), stop=all_over)
        except Exception as error:
            # the frames of its traceback hold tensors, so it is let go of
            reason = f"{type(error).__name__}: {error}"
            no_memory = out_of_memory(error)
        else:
            for index, request in enumerate(batch):
                self._finish(request, [one for one in written if one.image == index])
            return
        if no_memory:
            size.halve()
        if len(batch) > 1:
            self._halves(batch)
        else:
            batch[0].fail(_failed(reason))

    def _finish(self, request: Request, written: list[Written]) -> None:
        asked = request.questions
        try:
            answers = [
                self._reader.read(asked[w.place], w.tokens, w.score, request.open.size)
                for w in written
            ]
        except Exception as error:
            request.fail(error)
        else:
            request.answer(answers)

    def _halves(self, batch: list[Request]) -> None:
        middle = (len(batch) + 1) // 2
        self._answer(batch[:middle])
        self._answer(batch[middle:])


def _rows(asked: Sequence[Question]) -> list[Asked]:
    return [Asked(question.prompt, question.prefix) for question in asked]


def _failed(reason: str) -> ModelError:
    return ModelError(f"fastvlm.{OP}: the model failed on this picture ({reason})")


def _from_file(file: Any) -> Any:
    data = io.BytesIO(file) if isinstance(file, (bytes, bytearray, memoryview)) else file
    try:
        return open_picture(data)
    except PictureError as error:
        raise PictureError(
            f"fastvlm.{OP}: picture must be an image that can be read ({error})", str(error)
        ) from error
