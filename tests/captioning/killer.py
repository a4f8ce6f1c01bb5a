"""python killer.py FOLDER OUT KILLS OPTIONS…: runs the command, kills it KILLS times, lets it end.

Each run is a fork of this process, which has everything imported and has run no model: so a run
begins where the command does, not with seconds of imports.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import torch

import fastvlm.captioning.command  # noqa: F401
from fastvlm.__main__ import main


def one_run(arguments: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os._exit(main(arguments))
    return pid


def lines(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        return file.read().count(b"\n")


def go(folder: str, out: str, kills: int, options: list[str]) -> None:
    draw, killed, before = random.Random(5), 0, 0
    while killed < kills:
        pid = one_run(["caption", folder, "--out", out, "--resume", *options])
        # a random number of lines later, few of those that are left, or in the middle of one
        begun, wish = time.monotonic(), draw.randint(1, 10)
        while time.monotonic() - begun < 120:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                sys.exit(f"it ended before it was killed: {status}, after {killed} kills")
            if lines(out) >= before + wish:
                time.sleep(draw.uniform(0, 0.01))
                break
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        before = lines(out)
    pid = one_run(["caption", folder, "--out", out, "--resume", *options])
    _, status = os.waitpid(pid, 0)
    print(f"killed {killed} times")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    go(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
