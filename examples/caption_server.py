"""Captions over HTTP: uvicorn caption_server:app, curl --data-binary @photo.jpg :8000/caption"""

import asyncio
import os
from queue import Full

from fastapi import FastAPI, HTTPException, Request

import fastvlm
from fastvlm.captioning import models

name = os.environ.get("MODEL")  # microsoft/Florence-2-base; without it random weights
loaded = models.pretrained(name, None, "cpu") if name else models.random(True, "cpu")
fastvlm.patch(loaded.model)
captioner = fastvlm.Captioner(loaded.model, loaded.processor, max_new_tokens=64, most_waiting=64)
app = FastAPI()


@app.post("/caption")
async def caption(request: Request, task: str = "<CAPTION>") -> list[dict]:
    try:  # requests that come together decode together
        photo = await request.body()
        future = captioner.submit(photo, tasks=task, deadline=60, block=False)
        answer = asyncio.wrap_future(future)
        while not (await asyncio.wait([answer], timeout=0.1))[0]:
            if await request.is_disconnected():
                answer.cancel()  # a client that went away frees its place
        return [] if answer.cancelled() else [one.fields() for one in answer.result()]
    except (Full, TimeoutError) as error:
        raise HTTPException(503, f"{error}; try again later") from None
    except ValueError as error:  # no photo, no such task
        raise HTTPException(422, str(error)) from None
