"""What waits for a model: requests with deadlines, and the bounded room that they wait in."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from fastvlm.captioning.answers import Answer
from fastvlm.captioning.tasks import Question


@dataclass(frozen=True)
class Deadline:
    """A moment of time.monotonic(), or never."""

    at: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        return cls(float("inf") if seconds is None else time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.at - time.monotonic()


@dataclass
class Ready:
    """A picture that a model can look at: pixel_values [3, H, W], and its own width and height.

    Where features are kept: pixels are those of the picture, or, with its key, still to be
    computed.
    """

    pixels: Tensor
    size: tuple[int, int] | None
    key: bytes | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for pictures that one batch may hold."""
        return self.pixels.shape, self.key is None


@dataclass(eq=False)
class Request:
    """One picture and what is asked about it.

    The future stays pending until its answer is there, never "running": so it can be cancelled at
    any time, and whoever works on it asks `over` now and then.
    """

    picture: Any
    questions: tuple[Question, ...]
    deadline: Deadline
    future: Future[list[Answer]] = field(default_factory=Future)
    opened: Ready | None = None

    @property
    def open(self) -> Ready:
        assert self.opened is not None
        return self.opened

    def over(self) -> bool:
        """Whether nobody wants the answer any more: cancelled, answered, or too late."""
        if not self.future.done() and self.deadline.left <= 0:
            self.fail(TimeoutError("fastvlm.Captioner: the deadline passed before the answer came"))
        return self.future.done()

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self.future.set_exception(error)

    def answer(self, answers: list[Answer]) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(answers)


class Waiting:
    """Requests from submit() until a batch takes them: at most `most`, first come, first served."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._inside: dict[Request, None] = {}
        self._ready: deque[Request] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, request: Request, block: bool) -> bool:
        """Whether there was room. TimeoutError: none before the deadline; RuntimeError: closed."""
        with self._changed:
            while not self._closed and len(self._inside) >= self.most:
                if not block:
                    return False
                if request.deadline.left <= 0:
                    raise TimeoutError(
                        "fastvlm.Captioner: the deadline passed before there was room"
                    )
                self._wait(request.deadline.left)
            if self._closed:
                raise RuntimeError("fastvlm.Captioner: it is closed")
            self._inside[request] = None
        # a future keeps its callbacks: by a strong reference each request would be a cycle
        ref = weakref.ref(request)
        request.future.add_done_callback(lambda future: self._over(ref(), future))
        return True

    def _over(self, request: Request | None, future: Future[list[Answer]]) -> None:
        """Cancelled, failed or late: its place is free at once."""
        if request is not None:
            self.leave(request)
        if future.cancelled():
            # who waits for several futures hears of a cancelled one by this alone
            future.set_running_or_notify_cancel()

    def leave(self, request: Request) -> None:
        with self._changed:
            if self._inside.pop(request, self) is None:
                if request.opened is not None:
                    self._ready.remove(request)
                    request.opened = None
                self._changed.notify_all()

    def ready(self, request: Request, opened: Ready) -> None:
        """Its picture is open; a batch may take it."""
        with self._changed:
            if request in self._inside:
                request.opened = opened
                self._ready.append(request)
                self._changed.notify_all()

    def expire(self) -> None:
        """Fail those whose deadline has passed."""
        with self._changed:
            waiting = list(self._inside)
        for request in waiting:
            request.over()

    def take(self, limit_of: Callable[[Request], int], linger: float) -> list[Request] | None:
        """The oldest that is open, and others that were asked the same; None: closed and empty.

        Fewer than limit_of(the oldest) only where no other is being opened, or linger seconds were
        spent on it.
        """
        until: float | None = None
        while True:
            self.expire()
            with self._changed:
                if self._ready:
                    batch = self._alike(limit_of(self._ready[0]))
                    until = time.monotonic() + linger if until is None else until
                    left = until - time.monotonic()
                    others = len(self._inside) > len(self._ready)
                    if len(batch) >= limit_of(batch[0]) or not others or left <= 0:
                        return self._out(batch)
                    self._changed.wait(left)
                elif self._closed and not self._inside:
                    return None
                else:
                    self._wait(min((r.deadline.left for r in self._inside), default=float("inf")))

    def take_now(self, limit_of: Callable[[Request], int]) -> list[Request]:
        """The oldest that is open, and others that were asked the same, limit_of(the oldest) at
        most; none where none is open yet."""
        self.expire()
        with self._changed:
            return self._out(self._alike(limit_of(self._ready[0]))) if self._ready else []

    def _out(self, batch: list[Request]) -> list[Request]:
        for request in batch:
            self._ready.remove(request)
            del self._inside[request]
        self._changed.notify_all()
        return batch

    def _alike(self, most: int) -> list[Request]:
        first = self._ready[0]
        alike = (
            one
            for one in self._ready
            if one.questions == first.questions and one.open.kind == first.open.kind
        )
        return list(islice(alike, max(0, most)))

    def _wait(self, seconds: float) -> None:
        self._changed.wait(None if seconds == float("inf") else max(seconds, 0))

    def close(self, cancel: bool) -> None:
        """No more come in; those inside are cancelled, or may still be taken."""
        with self._changed:
            self._closed = True
            inside = list(self._inside)
            self._changed.notify_all()
        if cancel:
            for request in inside:
                request.future.cancel()
