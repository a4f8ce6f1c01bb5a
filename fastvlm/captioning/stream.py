"""Pictures that come into a decoding loop as others leave it: continuous batching."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from fastvlm.captioning.requests import Request, Waiting
from fastvlm.decoding.writer import Writer, Written
from fastvlm.generate.feed import Arrival

# pictures in a loop at most, in those that decode together at first: of some only one question of
# many may be left
_MOST = 2

Encode = Callable[[list[Request], int], list[Arrival]]
Answer = Callable[[Request, list[Written]], None]


class Stream:
    """A `fastvlm.generate.feed.Feed` of what waits, for one loop after the other.

    limit: the pictures that decode together, for a request like this. encode: requests, asked the
    same, and how many pictures there are with them -> what they bring; those that fail alone it
    fails itself. answer: called once all of a request is found.
    """

    def __init__(
        self, writer: Writer, waiting: Waiting, limit: Callable[[Request], int], encode: Encode,
        answer: Answer,
    ) -> None:  # fmt: skip
        self._writer, self._waiting, self._limit = writer, waiting, limit
        self._encode, self._answer = encode, answer
        self._found: dict[Request, dict[int, list[Written]]] = {}
        self._arrived: deque[Arrival] = deque()

    def run(self, batch: list[Request]) -> None:
        """Answer these, and what comes while they decode. Whatever it raises, `left` then says what
        has no answer yet."""
        self._take_in(batch)
        while self._arrived:
            first, rest = self._arrived.popleft().split()
            if rest is not None:
                self._arrived.appendleft(rest)
            self._writer.serve(first, self)

    def left(self) -> list[Request]:
        """Those without an answer, which are let go of."""
        left = [request for request in self._found if not request.over()]
        self._found.clear()
        self._arrived.clear()
        return left

    def _take_in(self, batch: list[Request]) -> None:
        batch = [request for request in batch if not request.over()]
        if not batch:
            return
        self._found |= {request: {} for request in batch}
        self._arrived += self._encode(batch, len(self._found))
        for request in batch:
            if request.future.done():  # the model failed on it
                self._let_go(request)

    def wants(self, tag: Any) -> bool:
        request: Request = tag[0]
        if request.over():
            self._let_go(request)
            return False
        return True

    def done(self, tag: Any, found: list[tuple[list[int], float]]) -> None:
        request, place = tag
        if request not in self._found:
            return
        answers = self._found[request]
        answers[place] = self._writer.written(found, place)
        if len(answers) == len(request.questions):
            written = [one for place in sorted(answers) for one in answers[place]]
            self._answer(request, written)
            self._let_go(request)

    def take(self, searches: int) -> Arrival | None:
        """The oldest that waits and others like it, as many as there is room for."""
        if not self._arrived:
            batch = self._waiting.take_now(lambda request: self._room(request, searches))
            if not batch:
                return None
            self._take_in(batch)
        return self._arrived.popleft() if self._arrived else None

    def _room(self, request: Request, searches: int) -> int:
        asked, limit = len(request.questions), self._limit(request)
        most = max(self._limit(one) * len(one.questions) for one in (*self._found, request))
        return min((most - searches) // asked, _MOST * limit - len(self._found))

    def _let_go(self, request: Request) -> None:
        self._found.pop(request, None)
        request.opened = None
