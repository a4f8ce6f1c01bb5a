"""A folder of pictures on a Ray cluster: python caption_on_ray.py PICTURES OUT [WORKERS]

OUT gets files of JSON lines, as `python -m fastvlm caption` writes them, in no order.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

import fastvlm
from fastvlm.captioning import lines, models

MODEL = os.environ.get("MODEL")  # microsoft/Florence-2-base; without it random weights
TASKS = ["<CAPTION>"]


class Captions:
    """What one worker holds: a model, and a captioner in which pictures decode together."""

    def __init__(self, folder: str):
        loaded = models.pretrained(MODEL, None, "cpu") if MODEL else models.random(True, "cpu")
        fastvlm.patch(loaded.model)
        self.folder, self.by = folder, {"model": loaded.id, "revision": loaded.revision}
        self.captioner = fastvlm.Captioner(loaded.model, loaded.processor, tasks=TASKS, num_beams=3)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        futures = [self.captioner.submit(bytes(picture)) for picture in batch["bytes"]]
        for path, future in zip(batch["path"], futures):
            path = os.path.relpath(path, self.folder).replace(os.sep, "/")
            try:
                found = lines.answered(path, future.result(), self.by)
            except (ValueError, OSError) as error:  # no picture: a line says so
                found = lines.failed(path, self.captioner.questions, error, self.by)
            yield {"line": [json.dumps(line, ensure_ascii=False) for line in found]}


def main(folder: str, out: str, workers: int = 2) -> None:
    folder = os.path.abspath(folder)
    ray.init(ignore_reinit_error=True)
    # of one machine for each worker; one of all is left for the reading
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes())
    cores = min((ray.cluster_resources()["CPU"] - 1) / workers, largest)
    cores = int(cores) if cores > 1 else cores
    pictures = ray.data.read_binary_files(folder, include_paths=True)
    # batches larger than what decodes together: while one is answered the next are opened
    answered = pictures.map_batches(
        Captions, fn_constructor_args=(folder,), batch_size=32, concurrency=workers, num_cpus=cores
    )
    os.makedirs(out)
    for number, batch in enumerate(answered.iter_batches(batch_size=None, batch_format="numpy")):
        with open(os.path.join(out, f"{number:05}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in batch["line"])


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
