"""The versions that are tested: one environment and one line of docs/versions.md for each row.

    make matrix                                    every row
    make matrix ROWS="transformers-5.17.0"         some
    make matrix ROWS=... PARTS="names families"    parts of them

Environments are made with pip in .envs/ROW and kept; what was found, with its date, is kept in
benchmarks/results/versions.json. A part that nobody ran is "not run" in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fastvlm.tables import markdown_table  # noqa: E402 (this file is run by its path)

RESULTS = ROOT / "benchmarks/results/versions.json"
PAGE = ROOT / "docs/versions.md"
FACTS = ("python", "torch", "transformers", "triton", "numpy")

# of each part: its tests, and the transformers from which on it says something
PARTS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "names": (("tests/test_compat.py",), (4, 48)),
    "families": (("tests/patching/test_versions.py",), (4, 48)),
    "more of families": (("tests/patching/test_families.py",), (5, 5)),
    "florenz": (("tests/florenz",), (5, 5)),
}


@dataclass(frozen=True)
class Row:
    """What an environment holds; python: the command of another interpreter than make's."""

    transformers: str = "5.23.0"
    torch: str = "2.13.0"
    python: str | None = None
    more: tuple[str, ...] = ()


ROWS: dict[str, Row] = {
    **{
        f"transformers-{version}": Row(transformers=version)
        for version in (
            "4.48.1", "4.57.6", "5.0.0", "5.5.4", "5.10.4", "5.17.0", "5.23.0", "5.24.0",
        )
    },
    # builds with CUDA where PyPI has no others; they ask for no GPU, and for gigabytes
    **{f"torch-{v}": Row(torch=v) for v in ("2.10.0", "2.11.0", "2.12.1", "2.14.1")},
    # the last transformers for it
    "python-3.10": Row(python="python3.10", transformers="5.20.2"),
    **{f"python-3.{n}": Row(python=f"python3.{n}") for n in (12, 13)},
    "numpy-1.26.4": Row(more=("numpy==1.26.4",)),
}  # fmt: skip
TOOLS = (
    *("pytest", "pytest-benchmark", "hypothesis", "pillow", "accelerate"),
    *("statsmodels", "matplotlib", "sacrebleu"),
)


def environment(name: str) -> Path:
    """The Python of a row's environment, made on first use."""
    row, folder = ROWS[name], ROOT / ".envs" / name
    python, ready = folder / "bin/python", folder / ".ready"
    if ready.exists():
        return python
    _call(row.python or sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "-q")
    _call(*pip, f"torch=={row.torch}")
    _call(*pip, f"transformers=={row.transformers}", *TOOLS, *row.more, "-e", str(ROOT))
    ready.touch()
    return python


def _call(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


def facts_of(python: Path) -> dict[str, str]:
    """The versions that are there, whatever the row asked for."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "def v(n):\n"
        "    try: return m.version(n)\n"
        "    except m.PackageNotFoundError: return 'none'\n"
        f"found = {{n: v(n) for n in {FACTS[1:]!r}}}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    facts: dict[str, str] = json.loads(done.stdout)
    return facts


def run(python: Path, tests: tuple[str, ...]) -> dict[str, Any]:
    """Run tests -> how many passed, failed (errors too) and were skipped, and which failed."""
    report = Path(python).parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(
        [*command, f"--junitxml={report}", *tests], cwd=ROOT, env=environment, check=False
    )
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    if not report.exists():
        return {"date": now, "passed": 0, "skipped": 0, "failed": ["pytest did not start"]}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [
        c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(failed) - skipped
    return {"date": now, "passed": passed, "skipped": skipped, "failed": failed}


def kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def cell(found: dict[str, Any] | None) -> str:
    """What the table says of one part: nothing is inferred."""
    if found is None:
        return "not run"
    text = f"{found['passed']} passed"
    text += f", {found['skipped']} skipped" if found["skipped"] else ""
    text += f", **{len(found['failed'])} failed**" if found["failed"] else ""
    return f"{text} ({found['date'][:10]})"


def page(results: dict[str, Any]) -> str:
    rows = []
    for name, row in ROWS.items():
        found = results.get(name)
        versions = [found["versions"][fact] for fact in FACTS] if found else ["-"] * len(FACTS)
        parts = found["parts"] if found else {}
        cells = [
            "no such part" if _numbers(row.transformers) < since else cell(parts.get(part))
            for part, (_, since) in PARTS.items()
        ]
        rows.append((name, *versions, *cells))
    return HEAD + markdown_table(("row", *FACTS, *PARTS), rows) + "\n"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


HEAD = """# Versions

What `make matrix` found, from benchmarks/results/versions.json; the rows are in tests/matrix.py.

- **transformers 5.5 to 5.24**: everything. The cache is `past_key_values` to 5.23, and `cache` from
  5.24 on; both names are taken.
- **transformers 4.48.1 to 5.4**: linear layers, norms, MLPs and losses. Attention, caches and
  decoding are left to transformers, and the report and `python -m fastvlm env` say so; Florenz and
  `fastvlm.caption` refuse by name.
- **Newer ones** are patched where the arguments of a module are those that are known, and report
  and `env` say that nobody has tested them.
- To 5.22 transformers runs Gemma-2 and T5Gemma by its sdpa, which leaves out the cap on the scores
  (`attn_logit_softcapping`); a patched model does the same, and the report says so.
- To 5.9 transformers' cache keeps the last `sliding_window` states of T5Gemma's encoder (4096 as
  published) in layers of sliding attention: `generate()` fails on more, or reads those alone. A
  patched model reads all, and the report says so.
- From 5.5 to 5.8 BART and mBART cannot tell where padded rows begin: `fastvlm.caption` decodes
  languages whose prefixes differ in length one after the other there.

`names`: every private name of another library (`fastvlm.compat`), called. `families`: tokens
(greedy and 3 beams), loss and gradients of BART, mBART, Florence-2, Donut, Gemma-2, T5Gemma,
PaliGemma 2 and Florenz, patched against unpatched; or refused by name. `more of families`: all that
are patched, in tests/patching/test_families.py. `florenz`: tests/florenz. A test is skipped where
that transformers has no such model. "not run" means that nobody has run it yet. From 5.21 on
transformers wants Python 3.11.

"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--no-keep", action="store_true", help="do not write the results")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"ROW must be one of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    failed = []
    for name in args.rows or ROWS:
        python = environment(name)
        versions = facts_of(python)
        for part in args.parts:
            tests, since = PARTS[part]
            if _numbers(ROWS[name].transformers) < since:
                continue
            found = run(python, tests)
            print(f"{name}: {part}: {cell(found)}", flush=True)
            failed += [f"{name}: {test}" for test in found["failed"]]
            if not args.no_keep:
                _keep(name, part, versions, found)
    print("\n".join(failed) or "nothing failed")
    return 1 if failed else 0


def _keep(name: str, part: str, versions: dict[str, str], found: dict[str, Any]) -> None:
    results = kept()
    row = results.get(name)
    if row is None or row["versions"] != versions:
        row = results[name] = {"versions": versions, "parts": {}}  # of other versions: not these
    row["parts"][part] = found
    results = {key: results[key] for key in ROWS if key in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    sys.exit(main())
