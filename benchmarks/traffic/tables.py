"""The counts as tables; where another side has fewer launches or bytes, they say which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm.tables import markdown_table

Record = dict[str, Any]
Rows = list[tuple[str, ...]]
OURS = "fastvlm"
LAYER_SIDES = ("transformers", "torch.compile", "Liger", OURS)
TRITON, CUDA = "fastvlm, Triton", "fastvlm, CUDA"
STEP_SIDES = ("transformers", "torch.compile", TRITON, CUDA)
PARTS = ("forward", "backward")


def total(*numbers: Mapping[str, Any]) -> tuple[int, int]:
    """Launches and bytes of all of these."""
    return sum(n["launches"] for n in numbers), sum(n["bytes"] for n in numbers)


def _fewest(found: Mapping[str, tuple[int, int]]) -> str:
    """Which sides have the fewest launches and the fewest bytes."""
    named = []
    for which, what in enumerate(("launches", "bytes")):
        least = min(counts[which] for counts in found.values())
        named.append(what + ": " + ", ".join(s for s, c in found.items() if c[which] == least))
    return "; ".join(named)


def _cells(
    found: Mapping[str, tuple[int, int]], sides: Sequence[str], unit: int, digits: int
) -> tuple[str, ...]:
    launches = [str(found[s][0]) if s in found else "-" for s in sides]
    moved = [f"{found[s][1] / unit:.{digits}f}" if s in found else "-" for s in sides]
    return (*launches, *moved, _fewest(found))


def _headers(first: Sequence[str], sides: Sequence[str], unit: str) -> tuple[str, ...]:
    return (*first, *(f"launches, {s}" for s in sides), *(f"{unit}, {s}" for s in sides), "fewest")


LAYER_HEADERS = _headers(("decoder layer", "step"), LAYER_SIDES, "MiB")
STEP_HEADERS = _headers(("model",), STEP_SIDES, "GiB")


def layer_rows(records: Sequence[Record]) -> Rows:
    """One line for each model and kind of step, and its backward in training."""
    by_case: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        by_case.setdefault((r["model"], r["kind"]), {})[r["side"]] = r
    lines = []
    for (model, kind), sides in by_case.items():
        for part in PARTS:
            found = {side: total(r[part]) for side, r in sides.items() if part in r}
            if found:
                step = f"{kind}, {part}" if kind == "training" else kind
                lines.append((model, step, *_cells(found, LAYER_SIDES, 2**20, 0)))
    return lines


def whole(record: Record) -> tuple[int, int] | None:
    """A step from token ids to the best continuations; None where it was not counted."""
    if "forward" in record:
        return total(record["forward"])
    return total(record["stack"], record["head"]) if "stack" in record else None


def step_rows(records: Sequence[Record]) -> Rows:
    by_model: dict[str, dict[str, Record]] = {}
    for r in records:
        by_model.setdefault(r["model"], {})[r["side"]] = r
    lines = []
    for model, sides in by_model.items():
        found = {side: counts for side, r in sides.items() if (counts := whole(r))}
        lines.append((model, *_cells(found, STEP_SIDES, 2**30, 2)))
    return lines


AROUND_HEADERS = (
    "model", "side", "stack: launches, GiB", "head: launches, GiB",
    "beams change places: launches, GiB",
)  # fmt: skip


def around_rows(records: Sequence[Record]) -> Rows:
    """What a step consists of, and what comes after it."""

    def cell(r: Record, part: str) -> str:
        if part not in r:
            return "-"
        launches, moved = total(r[part])
        return f"{launches}, {moved / 2**30:.3f}"

    parts = ("stack", "head", "reorder")
    return [
        (r["model"], r["side"], *(cell(r, part) for part in parts)) for r in records if "stack" in r
    ]


def notes(figures: Mapping[str, Any]) -> list[str]:
    """Which sides were not counted, and graph breaks of the compiled ones."""
    found = []
    for r in (*figures["counted"], *figures["steps"]):
        where = ", ".join(r[name] for name in ("model", "kind", "side") if name in r)
        if "missing" in r:
            found.append(f"{where}: not counted: {r['missing']}")
        if r.get("breaks"):
            found.append(f"{where}: the graph breaks: {r['breaks']}")
    return found


def markdown(figures: Mapping[str, Any]) -> str:
    """The section of the report."""
    versions = figures["versions"]
    intro = (
        "Counted on tensors without memory, bfloat16, torch "
        f"{versions['torch']}, transformers {versions['transformers']}; not timed. A launch is an "
        "operator of ATen that computes (a few, such as topk, start more than one kernel: on every "
        "side alike), a launch through Triton or one of the CUDA library; its bytes are those of "
        "the tensors that it reads and writes. transformers runs eager on a padded batch; "
        "torch.compile on the same, in default mode, with sdpa where the model allows it, counted "
        "from the code that it generates for an H100; Liger where its kernels fit; fastvlm on the "
        "packed rows."
    )
    parts = [intro, markdown_table(LAYER_HEADERS, layer_rows(figures["counted"]))]
    if figures["steps"]:
        work = figures["step"]
        parts += [
            f"A whole decoding step, {work['images']} images x {work['beams']} beams, "
            f"{work['keys']} keys of an image, token {work['filled']}: from token ids to the best "
            "continuations of each image. fastvlm: what `generate()` of a patched model runs, in "
            "which the head is `linear_topk` and a choice among the beams.",
            markdown_table(STEP_HEADERS, step_rows(figures["steps"])),
            "Where beams change places transformers copies its caches.",
            markdown_table(AROUND_HEADERS, around_rows(figures["steps"])),
        ]
    return "\n\n".join([*parts, *(f"- {note}" for note in notes(figures))])
