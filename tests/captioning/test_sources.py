"""Which pictures a source has, in which order, and who gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import encoded, fill, noise, shard

from fastvlm.captioning.sources import Source
from fastvlm.usage import UsageError


def paths(source: Source, rank: int = 0, world: int = 1) -> list[str]:
    return [item.path for item in source.items(rank, world)]


def test_a_folder_with_all_below_it(tmp_path: Path) -> None:
    fill(tmp_path, 7)
    (tmp_path / "readme.txt").write_text("not a picture")
    (tmp_path / "UPPER.JPG").write_bytes(encoded(noise(1), "JPEG"))
    (tmp_path / "._p000.jpg").write_bytes(b"what another system leaves behind")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    found = paths(Source([str(tmp_path)]))
    assert found == [
        "UPPER.JPG", "b/c/p002.png", "b/c/p005.jpg", "b/p001.jpg", "b/p004.png", "dead.png",
        "p000.png", "p003.jpg", "p006.png",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: object) -> None:
    import os

    fill(tmp_path, 3)
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/c"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # type: ignore[attr-defined]
    said: list[str] = []
    found = [item.path for item in Source([str(tmp_path)]).items(warn=said.append)]
    assert found == ["b/p001.jpg", "p000.png"]
    assert said == ["b/c/: Permission denied"]


def test_every_picture_has_one_process(tmp_path: Path) -> None:
    fill(tmp_path / "pictures", 11)
    for number in range(3):
        members = {f"{number}-{i}": {"png": encoded(noise(i))} for i in range(4)}
        shard(tmp_path / f"{number}.tar", members)
    folder, shards = Source([str(tmp_path / "pictures")]), Source([str(tmp_path / "{0..2}.tar")])
    for source in (folder, shards):
        for world in (1, 2, 3, 5):
            shared = [path for rank in range(world) for path in paths(source, rank, world)]
            assert sorted(shared) == sorted(paths(source))
    # whole shards, where there are enough
    assert {path[0] for path in paths(shards, 1, 2)} == {"1"}
    assert {path[0] for path in paths(shards, 4, 5)} == {"1", "2"}


def test_a_sample_is_its_key_and_its_first_picture(tmp_path: Path) -> None:
    picture = encoded(noise(1))
    path = shard(
        tmp_path / "a.tar",
        {
            "d.x/one": {"txt": b"words", "png": picture, "seg.png": b"a mask"},
            "words": {"txt": b"no picture"},
            "two": {"jpg": b"x", "json": b"{}"},
        },
    )
    items = list(Source([str(path)]).items())
    assert [(item.path, item.suffix) for item in items] == [("d.x/one", ".png"), ("two", ".jpg")]
    assert [item.read() for item in items] == [picture, b"x"]


def test_a_shard_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    members = {str(i): {"png": encoded(noise(i))} for i in range(3)}
    path = shard(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    items = list(Source([str(path)]).items())
    path.write_bytes(whole[: items[2].offset + 10])
    said: list[str] = []
    again = list(Source([str(path)]).items(warn=said.append))
    assert [item.path for item in again][:2] == ["0", "1"]
    assert again[1].read() == members["1"]["png"]
    if len(again) == 3:
        with pytest.raises(OSError, match="ends within the picture"):
            again[2].read()
    else:
        assert "a.tar" in said[0]


def test_patterns(tmp_path: Path) -> None:
    for name in ("s-08", "s-09", "s-10", "t{1}"):
        shard(tmp_path / f"{name}.tar", {name: {"png": b"x"}})
    assert len(Source([f"{tmp_path}/s-{{08..10}}.tar"]).shards) == 3
    assert len(Source([f"{tmp_path}/s-{{08,10}}.tar"]).shards) == 2
    assert len(Source([f"{tmp_path}/s-*.tar", f"{tmp_path}/s-08.tar"]).shards) == 3
    assert Source([f"{tmp_path}/t{{1}}.tar"]).shards == [f"{tmp_path}/t{{1}}.tar"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "f", 1)
    tar = shard(tmp_path / "a.tar", {"a": {"png": b"x"}})
    picture, folder = str(tmp_path / "f" / "p000.png"), str(tmp_path / "f")
    for given, wanted in (
        ([str(tmp_path / "missing")], "that is there; got"),
        ([str(tmp_path / "*.jpg")], "a pattern that something matches"),
        ([folder, picture], "not a folder beside others"),
        ([picture, str(tar)], "pictures or shards, not both"),
    ):
        with pytest.raises(UsageError, match=wanted):
            Source(given)
