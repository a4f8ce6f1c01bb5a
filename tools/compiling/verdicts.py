"""What makes the command fail: each rule says of one compiled kernel what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from fastvlm.triton import configs
from tools.compiling.architectures import ARCHITECTURES
from tools.compiling.code import Counts
from tools.compiling.driver import Job
from tools.compiling.work import Result

TENSOR_MEMORY = 512
_WIDE = ("128", "256", "TMA")
# rows of a tile from which Hopper's instruction for four warps at once can be used
WARPGROUP_ROWS = 64
# products of a decoding step, up to so many rows, wait for nothing but the weight that they read
STREAMED_ROWS = 64
STREAMING = (
    "geglu_forward",
    "gelu_forward",
    "low_precision_linear",
    "topk_tiles",
)


@dataclass(frozen=True)
class Excepted:
    """A rule that does not hold for a kernel, on the architectures that match, and why.

    words: what the finding must say, too, where only some of a kernel's configs are meant.
    """

    rule: str
    kernel: str
    arch: str
    reason: str
    words: str = "*"

    def covers(self, rule: str, result: Result, words: str) -> bool:
        job = result.job
        pairs = (job.kernel, self.kernel), (job.arch, self.arch), (words, self.words)
        return rule == self.rule and all(fnmatch(*pair) for pair in pairs)


EXCEPTIONS = (
    Excepted(
        "wide loads",
        "attention_combine",
        "*",
        "two numbers of each part of a row; the parts themselves go by 128 bits",
    ),
    Excepted("wide loads", "order_rows", "*", "one program sorts the labels of a batch, once"),
    Excepted("wide loads", "cross_entropy_combine", "*", "two numbers of each block of a row"),
    Excepted("wide loads", "live_steps", "*", "one number of each tile"),
    Excepted("wide loads", "topk_merge", "*", "a few candidates of each block of a row"),
    Excepted(
        "wide loads",
        "*",
        "gfx*",
        "the smallest factor of a step, rows of x or int8, is 8 bytes for each lane of wider waves",
        "narrow loads in the loop: 1 of 64 bits",
    ),
    Excepted(
        "tensor cores",
        "*",
        "sm_90",
        f"a warpgroup's product has {WARPGROUP_ROWS} rows, of which these tiles would fill a part",
        "no HGMMA: *",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """exception: the reason why it does not count."""

    rule: str
    result: Result
    words: str
    exception: str = ""


def _fits(result: Result, counts: Counts) -> str:
    limit = ARCHITECTURES[result.job.arch].shared
    if counts.shared > limit:
        return f"{counts.shared} bytes of shared memory; the limit is {limit}"
    if result.tensor_memory > TENSOR_MEMORY:
        return f"{result.tensor_memory} columns of tensor memory; the limit is {TENSOR_MEMORY}"
    return ""


def _spills(result: Result, counts: Counts) -> str:
    if counts.spill_loads or counts.spill_stores or counts.local:
        return (
            f"{counts.local} bytes of local memory, {counts.spill_loads} loads and "
            f"{counts.spill_stores} stores of it"
        )
    return ""


def streams(job: Job) -> bool:
    """Whether it is a product of a decoding step. In float32 a tile of more than 16 rows serves any
    number of them, but for a stored weight."""
    rows = int(job.constants.get("BLOCK_M", STREAMED_ROWS + 1))
    plain = job.arguments.startswith("*fp32") and job.kernel != "low_precision_linear"
    return job.kernel in STREAMING and rows <= (16 if plain else STREAMED_ROWS)


def _wide_loads(result: Result, counts: Counts) -> str:
    """Of kernels without a matrix product, whose loads are all they wait for, and, of the products
    of a decoding step, in the loop that reads the weight."""
    if result.dots:
        if not streams(result.job):
            return ""
        narrow = {bits: n for bits, n in counts.loop_loads.items() if bits not in _WIDE}
        many = ", ".join(f"{n} of {bits} bits" for bits, n in narrow.items())
        return f"narrow loads in the loop: {many}" if many else ""
    narrow = {bits: n for bits, n in counts.loads.items() if bits.isdigit() and int(bits) < 128}
    if sum(narrow.values()) <= result.scalar_loads:
        return ""
    many = ", ".join(f"{n} of {bits} bits" for bits, n in narrow.items())
    scalars = f" ({result.scalar_loads} are of single numbers)" if result.scalar_loads else ""
    return f"narrow loads: {many}{scalars}"


def _tensor_cores(result: Result, counts: Counts) -> str:
    rows = max((m for m, bits in result.dots if bits == 16), default=0)
    if not rows:
        return ""
    if not counts.tensor:
        return "a product of 16-bit matrices without an instruction of the tensor cores"
    if result.job.arch == "sm_90" and not counts.tensor.get("HGMMA"):
        by = " and ".join(counts.tensor)
        if rows >= WARPGROUP_ROWS:
            return f"tiles of {rows} rows by {by} instead of HGMMA"
        return f"no HGMMA: tiles of {rows} rows, by {by}"
    return ""


def _resident(result: Result, counts: Counts) -> str:
    """A persistent grid has as many programs as the device holds: as its table says."""
    job = result.job
    if job.constants.get("PERSISTENT") != "1":
        return ""
    architecture = ARCHITECTURES[job.arch]
    held, _ = architecture.occupancy(counts.registers, counts.shared, job.warps)
    wanted = _residents(architecture.family, job)
    if len(wanted) == 1 and 0 < max(wanted) <= held:
        return ""
    return f"{held} programs share a multiprocessor; its table says {sorted(wanted)}"


def _residents(family: str, job: Job) -> set[int]:
    """What the table says of the configs of these blocks, warps and stages."""
    said = job.constants
    return {
        config.resident
        for case in configs.table(family)[job.kernel]
        for config in case.configs
        if all(said[name] == str(value) for name, value in config.blocks.items())
        and (said["warps"], said["stages"]) == (str(config.num_warps), str(config.num_stages))
    }


RULES: dict[str, Callable[[Result, Counts], str]] = {
    "fits": _fits,
    "spills": _spills,
    "wide loads": _wide_loads,
    "tensor cores": _tensor_cores,
    "resident": _resident,
}


def judge(results: Iterable[Result], exceptions: Iterable[Excepted] = EXCEPTIONS) -> list[Verdict]:
    """What is wrong, in the order of the results; excepted findings carry their reason."""
    exceptions, found = tuple(exceptions), []
    for result in results:
        if result.counts is None:
            found.append(Verdict("compiles", result, result.failure))
            continue
        for rule, says in RULES.items():
            words = says(result, result.counts)
            if words:
                reason = next((e.reason for e in exceptions if e.covers(rule, result, words)), "")
                found.append(Verdict(rule, result, words, reason))
    return found
