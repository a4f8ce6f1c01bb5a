"""examples/caption_server.py over loopback: a photo, no photo, a client that goes away."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import encoded, noise

pytest.importorskip("fastapi", reason="fastapi is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, str]]:
    """The example's module and its address."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import caption_server
    finally:
        sys.path.remove(str(EXAMPLES))
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(caption_server.app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [free]})
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield caption_server, f"http://127.0.0.1:{port}/caption"
    running.should_exit = True
    thread.join(30)
    caption_server.captioner.close()


def post(url: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, data=body, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_photo_and_what_is_none(server: tuple[Any, str]) -> None:
    module, url = server
    want = module.captioner.submit(noise(1)).result(120)[0]
    status, answers = post(url, encoded(noise(1)))
    assert (status, answers[0]["text"], answers[0]["task"]) == (200, want.text, "<CAPTION>")
    status, answers = post(f"{url}?task=OD", encoded(noise(1)))
    assert (status, answers[0]["boxes"]) == (200, [])
    status, refused = post(url, b"this is no photo")
    assert status == 422
    assert "no image format that Pillow knows" in refused["detail"]
    status, refused = post(f"{url}?task=%3CX%3E", encoded(noise(1)))
    assert status == 422
    assert "tasks must be a task of <CAPTION>" in refused["detail"]


def test_a_client_that_goes_away_frees_its_place(
    server: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, url = server
    gate, entered, futures = threading.Event(), threading.Event(), []
    model, captioner = module.loaded.model, module.captioner
    tower, submit = model.get_image_features, captioner.submit

    def features(pixels: Any) -> Any:
        entered.set()
        assert gate.wait(120)
        return tower(pixels)

    def noted(*args: Any, **kwargs: Any) -> Any:
        futures.append(submit(*args, **kwargs))
        return futures[-1]

    monkeypatch.setattr(model, "get_image_features", features)
    monkeypatch.setattr(captioner, "submit", noted)
    host, port = url.split("/")[2].split(":")
    body = encoded(noise(2))
    head = f"POST /caption HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection((host, int(port)))
    client.sendall(head.encode() + body)
    assert entered.wait(120)
    client.close()
    until = time.monotonic() + 60
    while not futures[0].cancelled() and time.monotonic() < until:
        time.sleep(0.02)
    assert futures[0].cancelled()
    gate.set()
    assert post(url, encoded(noise(1)))[0] == 200
