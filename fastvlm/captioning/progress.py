"""How far a job is: pictures a second and time left, with tqdm where it is installed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

_EVERY = 10.0
_MOST_POINTS = 240


class Progress:
    """Counts pictures of one process; show: whether stderr hears of it.

    count: yields one thing for each picture that is to be done. It runs beside the job, so the time
    left is known as soon as the pictures are counted.
    """

    def __init__(self, show: bool, count: Callable[[], Iterable[object]]) -> None:
        self.done = 0
        self.points: list[tuple[float, int]] = [(0.0, 0)]
        self._begun = self._told = time.monotonic()
        self._gap = 1.0
        self._total: int | None = None
        self._stop = False
        self._bar: Any = None
        self._show = show
        if show:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                pass
            else:
                self._bar = tqdm(
                    unit=" photos", file=sys.stderr, smoothing=0.05, dynamic_ncols=True
                )
            self._counting = threading.Thread(target=self._count, args=(count,), daemon=True)
            self._counting.start()

    def _count(self, count: Callable[[], Iterable[object]]) -> None:
        total = 0
        for _ in count():
            if self._stop:
                return
            total += 1
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def step(self, pictures: int) -> None:
        self.done += pictures
        now = time.monotonic() - self._begun
        if now - self.points[-1][0] >= self._gap:
            self.points.append((now, self.done))
            if len(self.points) > _MOST_POINTS:
                self.points = self.points[::2]
                self._gap *= 2
        if self._bar is not None:
            self._bar.update(pictures)
        elif self._show and time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            self.say(self._line(now))

    def _line(self, now: float) -> str:
        rate = self.done / now
        text = f"{self.done} photos, {rate:.2f} a second"
        if self._total is not None:
            rest = self._total - self.done
            left = timedelta(seconds=int(rest / rate)) if rate else "unknown"
            text += f", {rest} to go, time left {left}"
        return text

    def say(self, text: str) -> None:
        """A line on stderr, beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def close(self) -> None:
        self._stop = True
        if self.done > self.points[-1][1]:
            self.points.append((self.seconds, self.done))
        if self._show:
            self._counting.join(1.0)
        if self._bar is not None:
            self._bar.close()
