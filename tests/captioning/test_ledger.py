"""The output file: whole lines only, whatever happens."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from fastvlm.captioning.ledger import Done, Ledger, LedgerError, encode, read_lines, rewrite
from fastvlm.usage import UsageError


def line(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "task": "<CAPTION>", "language": None, "model": "m", **more}


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    odd = b"caf\xe9 \xe2\x82\xac.png".decode("utf-8", "surrogateescape")
    out = tmp_path / "o.jsonl"
    out.write_bytes(encode(line(odd)) + encode(line("ä", text="图\u2028")))
    assert [found["path"] for _, found in read_lines(out)] == [odd, "ä"]
    assert out.read_bytes().decode()


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    whole = encode(line("a")) + encode(line("b"))
    for cut in range(1, len(encode(line("c")))):
        out.write_bytes(whole + encode(line("c"))[:cut])
        done = Done(retry=False)
        assert done.read(out) == len(whole)
        assert len(done) == 2
    out.write_bytes(whole + b"\0" * 100 + b"\n")
    assert Done(retry=False).read(out) == len(whole)
    out.write_bytes(b"not ours\n" + whole)
    with pytest.raises(UsageError, match="another line at byte 0"):
        Done(retry=False).read(out)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: a write ends in the middle, then fails."""
    out = tmp_path / "o.jsonl"
    ledger = Ledger(out)
    ledger.append([line("a"), line("b")])
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, hard))
    try:
        with pytest.raises(LedgerError, match=r"o\.jsonl: File too large"):
            ledger.append([line("c"), line("d")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == before
    ledger.append([line("e")])
    ledger.close()
    assert [json.loads(row)["path"] for row in out.read_text().splitlines()] == ["a", "b", "e"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "o.jsonl")
    with pytest.raises(UsageError, match="no other process is writing"):
        Ledger(tmp_path / "o.jsonl")
    first.close()
    Ledger(tmp_path / "o.jsonl").close()
    with pytest.raises(
        UsageError, match=r"--out wants a file that can be written; got .*directory"
    ):
        Ledger(tmp_path)


def test_parts_become_one_file_with_each_key_once(tmp_path: Path) -> None:
    out, part = tmp_path / "o.jsonl", tmp_path / "part"
    out.write_bytes(encode(line("a")) + encode(line("b", error="no")))
    part.write_bytes(encode(line("a")) + encode(line("c")) + b'{"path"')
    rewrite(out, [out, part], keep_errors=True)
    assert [found["path"] for _, found in read_lines(out)] == ["a", "b", "c"]
    rewrite(out, [out], keep_errors=False)
    assert [found["path"] for _, found in read_lines(out)] == ["a", "c"]
