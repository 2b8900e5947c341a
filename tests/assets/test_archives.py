"""Zip archives, honest and hostile: a hostile one is refused whole, with good files in it too."""

import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from twostage.assets import archives
from twostage.assets.archives import extract
from twostage.errors import DownloadError, UsageError

TEXT = b"sentence\tlabel\n" + b"a good film\t1\n" * 500
Entry = tuple[str | zipfile.ZipInfo, bytes]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes an archive with `good.tsv` and whatever else is given."""

    def make(*entries: Entry, compression: int = zipfile.ZIP_DEFLATED) -> Path:
        path = tmp_path / "archive.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (("good.tsv", TEXT), *entries):
                archive.writestr(name, content)
        return path

    return make


def entry(name: str, mode: int = stat.S_IFREG | 0o644, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.filename = info.orig_filename = name  # with its backslashes
    info.create_system = system
    info.external_attr = mode << 16
    return info


def refusal(archive: Path, members: dict[str, Path], max_bytes: int = 1 << 24) -> str:
    """The message of a DownloadError: one sentence; nothing was placed and nothing is left."""
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(DownloadError) as caught:
        extract(archive, members, max_bytes=max_bytes)
    assert sorted(archive.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    assert "download it again" in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_only_the_named_members_are_taken_out(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(("folder/", b""), ("folder/small.txt", b"small"), ("other.txt", b"other"))
    out = tmp_path / "new" / "folder"
    extract(archive, {"good.tsv": out / "a.tsv", "folder/small.txt": out / "b"}, max_bytes=1 << 20)
    assert (out / "a.tsv").read_bytes() == TEXT
    assert (out / "b").read_bytes() == b"small"
    assert sorted(path.name for path in out.iterdir()) == ["a.tsv", "b"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_members_are_the_same(
    make: Callable[..., Path], tmp_path: Path, compression: int
) -> None:
    extract(make(compression=compression), {"good.tsv": tmp_path / "a"}, max_bytes=1 << 20)
    assert (tmp_path / "a").read_bytes() == TEXT


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (name, "names a file outside of it")
        for name in (
            "/etc/passwd",
            "//server/share",
            "C:/windows/x",
            "c:x",
            "../x",
            "a/../../x",
            "a/..",
            "..",
            "..\\x",
            "a\\b",
            "a\0b",
            "",
        )
    ],
)
def test_a_name_that_leads_outside_condemns_the_archive(
    make: Callable[..., Path], tmp_path: Path, name: str, said: str
) -> None:
    assert said in refusal(make((entry(name), b"x")), {"good.tsv": tmp_path / "a"})


@pytest.mark.parametrize("name", ["a..b", "...", "a/b/c.txt", "a:b/c", "ä b", "-rf"])
def test_an_unusual_name_condemns_nothing(
    make: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    if name == "a:b/c":
        name = "ab:/c"  # a drive has one letter
    extract(make((entry(name), b"x")), {"good.tsv": tmp_path / "a"}, max_bytes=1 << 20)
    assert (tmp_path / "a").read_bytes() == TEXT


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
@pytest.mark.parametrize("system", [0, 3])
def test_links_and_devices_condemn_the_archive(
    make: Callable[..., Path], tmp_path: Path, mode: int, system: int
) -> None:
    archive = make((entry("link", mode | 0o777, system), b"/etc/passwd"))
    assert "holds a link or device, 'link'" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_one_name_twice_condemns_the_archive(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make(("good.tsv", b"other"))
    assert "holds 'good.tsv' twice" in refusal(archive, {"good.tsv": tmp_path / "a"})


def patch(archive: Path, offset_central: int, offset_local: int, value: bytes) -> Path:
    """Overwrite a field of the first member, in the table of contents and before the member."""
    raw = bytearray(archive.read_bytes())
    central = raw.index(b"PK\x01\x02")
    for start in (central + offset_central, offset_local):
        raw[start : start + len(value)] = value
    archive.write_bytes(raw)
    return archive


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
def test_encrypted_members_condemn_the_archive(
    make: Callable[..., Path], tmp_path: Path, flag: int
) -> None:
    archive = patch(make(), 8, 6, struct.pack("<H", flag))
    assert "is encrypted at 'good.tsv'" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_an_unusual_compression_condemns_the_archive(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make(compression=zipfile.ZIP_LZMA)
    assert "unusual compression" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_too_many_members_condemn_the_archive(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make(("b", b""), ("c", b""))
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2)
    assert "holds 3 files, more than 2" in refusal(archive, {"good.tsv": tmp_path / "a"})
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    extract(archive, {"good.tsv": tmp_path / "a"}, max_bytes=1 << 20)


def test_the_limit_counts_what_was_not_asked_for_too(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make(("other", b"x" * 1_000))
    total = len(TEXT) + 1_000
    said = refusal(archive, {"good.tsv": tmp_path / "a"}, max_bytes=total - 1)
    assert f"unpacks to {total:,} bytes, more than {total - 1:,}" in said
    extract(archive, {"good.tsv": tmp_path / "a"}, max_bytes=total)


def test_a_bomb_condemns_the_archive_whatever_the_limit(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make(("zeros", bytes(2 << 20)))
    assert archive.stat().st_size < 10_000
    said = refusal(archive, {"good.tsv": tmp_path / "a"}, max_bytes=1 << 40)
    assert "is a bomb: 'zeros' unpacks to 2,097,152 bytes" in said


@pytest.mark.parametrize("size", [len(TEXT) - 1, len(TEXT) + 1, 10])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_lies_about_the_size_is_found_out(
    make: Callable[..., Path], tmp_path: Path, size: int, compression: int
) -> None:
    archive = patch(make(compression=compression), 24, 22, struct.pack("<I", size))
    with zipfile.ZipFile(archive) as opened:
        assert opened.getinfo("good.tsv").file_size == size
    assert "is not a whole zip archive" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_a_wrong_checksum_is_found_out(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(compression=zipfile.ZIP_STORED)
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"a good film")] ^= 1
    archive.write_bytes(raw)
    assert "is not a whole zip archive" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_a_cut_archive_is_found_out_wherever_it_was_cut(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make(("b", b"b" * 100))
    whole = archive.read_bytes()
    for length in range(0, len(whole), 7):
        archive.write_bytes(whole[:length])
        assert "is not a whole zip archive" in refusal(archive, {"good.tsv": tmp_path / "a"})


def test_a_flipped_byte_yields_the_right_content_or_one_sentence(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make()
    whole = archive.read_bytes()
    refused = 0
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= 0xFF
        archive.write_bytes(raw)
        try:
            extract(archive, {"good.tsv": tmp_path / "a"}, max_bytes=1 << 24)
        except DownloadError:
            refused += 1
            assert not (tmp_path / "a").exists()
        else:  # a date, say
            assert (tmp_path / "a").read_bytes() == TEXT
            (tmp_path / "a").unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"]
    assert refused > len(whole) / 2


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>", b"x" * 1_000])
def test_what_is_no_zip_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "archive.zip").write_bytes(content)
    said = refusal(tmp_path / "archive.zip", {"good.tsv": tmp_path / "a"})
    assert re.search("is not a whole zip archive; delete it and download it again$", said)


@pytest.mark.parametrize("name", ["missing.tsv", "folder/", "Good.tsv"])
def test_a_missing_member_is_named(make: Callable[..., Path], tmp_path: Path, name: str) -> None:
    archive = make(("folder/", b""))
    members = {"good.tsv": tmp_path / "a", name: tmp_path / "b"}
    assert f"holds no file '{name}'" in refusal(archive, members)


def test_if_one_member_fails_none_is_placed(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(("bad", b"marked"), compression=zipfile.ZIP_STORED)
    archive.write_bytes(archive.read_bytes().replace(b"marked", b"market"))
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
    refusal(archive, {"good.tsv": tmp_path / "a", "bad": tmp_path / "b"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_a_usage_error(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    archive = make(("b", b"b"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        extract(archive, {"good.tsv": tmp_path / "file" / "a"}, max_bytes=1 << 20)
    (tmp_path / "folder").mkdir()
    members = {"good.tsv": tmp_path / "a", "b": tmp_path / "folder"}
    with pytest.raises(UsageError, match="folder': it is a folder"):
        extract(archive, members, max_bytes=1 << 20)
    assert not (tmp_path / "a").exists()


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"none\.zip' cannot be read: No such file"):
        extract(tmp_path / "none.zip", {}, max_bytes=1)
