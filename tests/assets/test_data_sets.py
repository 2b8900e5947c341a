"""Data sets: what becomes of them, and what is said when they can't be had or others are there."""

import bz2
import io
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from twostage.assets.data_sets import (
    AUG_HOSTS,
    AUG_PAGE,
    AUG_URL,
    SST2_ROWS,
    SST2_SHA256,
    SST2_URL,
    fetch_aug,
    fetch_demo,
    fetch_sst2,
    in_dev_split,
    read_snippets,
)
from twostage.data.tables import read_table
from twostage.errors import DownloadError, TwoStageWarning, UsageError


def test_snippets_lose_repetitions_blanks_and_plots() -> None:
    raw = (
        "category,text,movie_name\n"
        'fresh,"So  good,\nreally",a\nrotten,Bad.,a\nplot,A story.,a\n'
        'fresh,  ,b\nrotten,"So good, really",b\nfresh,Bad.,c\n'
    )
    assert read_snippets(bz2.compress(raw.encode())) == [("So good, really", 1), ("Bad.", 0)]


def test_the_demo_data_is_split_by_text_without_overlap(demo_folder: Path) -> None:
    train, dev = read_table(demo_folder / "train.tsv"), read_table(demo_folder / "dev.tsv")
    assert (len(train), len(dev)) == (11_497, 1_255)
    assert all(in_dev_split(text) for text in dev.texts)
    assert not any(in_dev_split(text) for text in train.texts)
    assert len(set(train.texts) | set(dev.texts)) == 11_497 + 1_255
    assert [list(train.labels).count(label) for label in ("0", "1")] == [4_860, 6_637]
    assert [list(dev.labels).count(label) for label in ("0", "1")] == [524, 731]


def test_a_second_fetch_does_nothing(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch_demo(demo_folder) is False


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for x\n", "No matching"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n", "DO NOT MATCH THE HASHES"),
        ("/usr/bin/python3: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(DownloadError, match=said) as caught:
        fetch_demo(tmp_path / "demo")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert list((tmp_path / "demo").iterdir()) == []


def test_other_peoples_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nmine\t1\n")
    with pytest.raises(UsageError, match=r"train\.tsv' is not the demo's; choose another folder"):
        fetch_demo(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write '.*file"):
        fetch_demo(tmp_path / "file")


def test_a_terminal_shows_pips_own_bar_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for show_progress in (False, True):
        with pytest.raises(DownloadError):
            fetch_demo(tmp_path, show_progress=show_progress)
    assert ["--quiet" in command for command in commands] == [True, False]


def sst2_table(rows: int) -> bytes:
    lines = [f"film number {i} 's `` good ''\t{i % 2}\n" for i in range(rows)]
    return ("sentence\tlabel\n" + "".join(lines)).encode()


def zipped(**tables: bytes) -> bytes:
    """An archive as GLUE's is: the tables and other files in a folder."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("SST-2/", b"")
        archive.writestr("SST-2/original/README.txt", b"read me")
        for name, content in tables.items():
            archive.writestr(f"SST-2/{name}.tsv", content)
    return file.getvalue()


SMALL = {"train": sst2_table(20), "dev": sst2_table(4)}


@pytest.fixture
def settings(client: httpx.Client, slept: list[float]) -> dict[str, Any]:
    return {"client": client, "sleep": slept.append}


@pytest.fixture
def sst2_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """For archives that the tests make themselves."""
    return settings | {"sha256": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_sst2_arrives_byte_for_byte_and_the_second_fetch_asks_nobody(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tables = {"train": sst2_table(67_349), "dev": sst2_table(872)}
    url = server.file("/SST-2.zip", zipped(**tables), cuts=(5_000,))
    folder = tmp_path / "SST-2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch_sst2(folder, url=url, **sst2_settings) is True
    assert names(folder) == ["dev.tsv", "train.tsv"]
    for name, content in tables.items():
        assert (folder / f"{name}.tsv").read_bytes() == content
        assert len(read_table(folder / f"{name}.tsv")) == SST2_ROWS[f"{name}.tsv"]
    assert len(server.requests) == 2

    assert fetch_sst2(folder, url=url, **sst2_settings) is False
    assert len(server.requests) == 2
    assert capfd.readouterr() == ("", "")


def test_the_published_addresses_are_asked(tmp_path: Path) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(404)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        for fetch in (fetch_sst2, fetch_aug):
            with pytest.raises(DownloadError, match=r"status 404"):
                fetch(tmp_path / "new", client=client)
    assert asked == [SST2_URL, AUG_URL]
    assert asked[0] == "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
    assert asked[1].endswith("?export=download&id=1PyTdS9Ev_OhsU2WQSQWRxBw8TV8Z27tB")


def test_an_archive_that_is_not_glues_is_refused_by_its_checksum(
    server: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    url = server.file("/SST-2.zip", zipped(**SMALL))
    with pytest.raises(DownloadError, match=rf"sha256 [0-9a-f]{{64}} instead of {SST2_SHA256}"):
        fetch_sst2(tmp_path, url=url, **settings)
    assert names(tmp_path) == []


def test_another_number_of_rows_is_a_warning(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path
) -> None:
    url = server.file("/SST-2.zip", zipped(**SMALL))
    with pytest.warns(TwoStageWarning) as caught:
        assert fetch_sst2(tmp_path, url=url, **sst2_settings) is True
    assert [str(warning.message) for warning in caught] == [
        "train.tsv of SST-2 has 20 rows instead of 67,349, so scores may differ from published "
        "ones",
        "dev.tsv of SST-2 has 4 rows instead of 872, so scores may differ from published ones",
    ]
    assert names(tmp_path) == ["dev.tsv", "train.tsv"]


@pytest.mark.filterwarnings("ignore::twostage.errors.TwoStageWarning")
@pytest.mark.parametrize(
    ("dev", "said"),
    [
        (b"text\tlabel\na\t1\nb\t0\n", "has the header 'text\\tlabel' instead of"),
        (b"sentence,label\na,1\nb,0\n", "has the header 'sentence,label' instead of"),
        (b"sentence\tlabel\tidx\na\t1\t0\n", "has the header 'sentence\\tlabel\\tidx'"),
        (b"sentence\tlabel\na\t1\nb\t2\n", "has the labels '1', '2' instead of 0 and 1"),
        (b"sentence\tlabel\na\t1\nb\n", "line 3: 1 fields, but the header has 2"),
        (b"sentence\tlabel\n", "has a header but no rows"),
        (b"sentence\tlabel\n\xff\t1\n", "line 2: not valid"),
        (b"", "has the header '' instead of"),
    ],
)
def test_an_archive_with_other_tables_places_none_of_them(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path, dev: bytes, said: str
) -> None:
    url = server.file("/SST-2.zip", zipped(train=SMALL["train"], dev=dev))
    with pytest.raises(DownloadError) as caught:
        fetch_sst2(tmp_path, url=url, **sst2_settings)
    assert said in str(caught.value)
    assert f"SST-2/dev.tsv in '{tmp_path}" in str(caught.value)
    assert ".unpacked" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"PK", zipped(train=SMALL["train"])])
def test_a_damaged_archive_leaves_nothing(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(DownloadError, match=r"SST-2\.zip' (is not a whole|holds no file)"):
        fetch_sst2(tmp_path, url=server.file("/SST-2.zip", content), **sst2_settings)
    assert names(tmp_path) == []


def test_a_failed_fetch_says_what_to_do_by_hand_and_that_way_works(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path
) -> None:
    url = server.answer("/SST-2.zip", b"<html>Blocked", kind="text/html")
    with pytest.raises(DownloadError) as caught:
        fetch_sst2(tmp_path, url=url, **sst2_settings)
    assert str(caught.value) == (
        f"{url} answered with a web page instead of the file; get it in a browser, save it as "
        f"'{tmp_path / 'SST-2.zip'}' and run the command again"
    )
    server.requests.clear()
    (tmp_path / "SST-2.zip").write_bytes(zipped(**SMALL))
    with pytest.warns(TwoStageWarning):
        assert fetch_sst2(tmp_path, url=url, **sst2_settings) is True
    assert server.requests == []
    assert (tmp_path / "train.tsv").read_bytes() == SMALL["train"]
    assert names(tmp_path) == ["SST-2.zip", "dev.tsv", "train.tsv"]  # theirs, so it stays


@pytest.mark.filterwarnings("ignore::twostage.errors.TwoStageWarning")
def test_tables_of_others_are_not_overwritten(
    server: Any, sst2_settings: dict[str, Any], tmp_path: Path
) -> None:
    url = server.file("/SST-2.zip", zipped(**SMALL))
    dev = tmp_path / "dev.tsv"
    dev.write_bytes(b"text\tlabel\nmine\t1\n")  # not its header: seen without a request
    with pytest.raises(UsageError, match=r"dev\.tsv' is another file; choose another folder"):
        fetch_sst2(tmp_path, url=url, **sst2_settings)
    assert server.requests == []
    dev.write_bytes(b"sentence\tlabel\nmine\t1\n")  # its header, but not its rows
    with pytest.raises(UsageError, match=r"dev\.tsv' is not SST-2's; choose another folder"):
        fetch_sst2(tmp_path, url=url, **sst2_settings)
    assert dev.read_bytes() == b"sentence\tlabel\nmine\t1\n"
    assert names(tmp_path) == ["dev.tsv"]
    dev.write_bytes(SMALL["dev"])  # what a fetch that was killed may leave
    assert fetch_sst2(tmp_path, url=url, **sst2_settings) is True
    assert names(tmp_path) == ["dev.tsv", "train.tsv"]


AUG = b'org_ind,text,label\n3,"A film, and good.",0\n'


@pytest.fixture
def drive(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "allowed_hosts": ("127.0.0.1",)}


def confirmation(action: str) -> bytes:
    """Google's page, its parts that matter."""
    return f"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>
    <body><p>Google Drive can't scan this file for viruses.</p>
    <form id="search"><input type="text" name="q"></form>
    <form id="download-form" action="{action}" method="get">
    <input type="submit" id="uc-download-link" value="Download anyway"/>
    <input type="hidden" name="id" value="ID"><input type="hidden" name="export" value="download">
    <input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a&amp;b">
    </form></body></html>""".encode()


def test_the_paraphrases_arrive_and_the_second_fetch_asks_nobody(
    server: Any, drive: dict[str, Any], tmp_path: Path
) -> None:
    server.file("/download", AUG)
    url = server.answer("/uc", status=303, Location="/download?id=1")
    folder = tmp_path / "down_sampled" / "0.2"
    assert fetch_aug(folder, url=url, **drive) is True
    assert (folder / "aug.csv").read_bytes() == AUG
    assert names(folder) == ["aug.csv"]
    assert len(server.requests) == 2
    assert fetch_aug(folder, url=url, **drive) is False
    assert len(server.requests) == 2


def test_the_virus_warning_is_confirmed_once_with_its_fields(
    server: Any, drive: dict[str, Any], tmp_path: Path
) -> None:
    server.file("/download", AUG)
    page = confirmation(f"{server.url}/download")
    url = server.answer("/uc", page, kind="text/html; charset=utf-8", Set_Cookie="seen=1")
    assert fetch_aug(tmp_path, url=url, **drive) is True
    assert (tmp_path / "aug.csv").read_bytes() == AUG
    assert len(server.requests) == 2
    asked = urlsplit(server.requests[1][1])
    assert asked.path == "/download"
    fields = {"id": ["ID"], "export": ["download"], "confirm": ["t"], "uuid": ["a&b"]}
    assert parse_qs(asked.query) == fields
    assert server.requests[1][2]["Cookie"] == "seen=1"


def test_a_page_that_asks_again_and_again_is_confirmed_once(
    server: Any, drive: dict[str, Any], tmp_path: Path
) -> None:
    url = server.answer("/uc", confirmation("/uc"), kind="text/html")
    with pytest.raises(DownloadError, match="its title is 'Google Drive - Virus scan warning'"):
        fetch_aug(tmp_path, url=url, **drive)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("http://drive.usercontent.google.com/x", "is not an https address and was not asked"),
        ("https://evil.example/x", "was not asked, since this file comes from google.com or"),
        ("https://google.com.evil.example/x", "was not asked, since this file comes from"),
        ("https://[bad", "Google Drive answered with a web page instead of the file"),
    ],
)
def test_a_form_that_leads_elsewhere_is_not_followed(
    tmp_path: Path, action: str, said: str
) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        page = httpx.ByteStream(confirmation(action))
        return httpx.Response(200, headers={"Content-Type": "text/html"}, stream=page)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as client,
        pytest.raises(DownloadError) as caught,
    ):
        fetch_aug(tmp_path, client=client)
    assert asked == ["drive.google.com"]
    assert said in str(caught.value)
    assert str(caught.value).endswith(
        f"open {AUG_PAGE} in a browser and save the file as '{tmp_path / 'aug.csv'}'"
    )


def test_googles_own_servers_are_allowed(tmp_path: Path) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "drive.google.com":
            page = httpx.ByteStream(confirmation("https://drive.usercontent.google.com/download"))
            return httpx.Response(200, headers={"Content-Type": "text/html"}, stream=page)
        if request.url.host == "drive.usercontent.google.com":
            place = "https://doc-0.googleusercontent.com/x"
            return httpx.Response(302, headers={"Location": place})
        return httpx.Response(200, stream=httpx.ByteStream(AUG))

    assert AUG_HOSTS == ("google.com", "googleusercontent.com")
    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert fetch_aug(tmp_path, client=client) is True
    assert asked == [
        "drive.google.com",
        "drive.usercontent.google.com",
        "doc-0.googleusercontent.com",
    ]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (
            "<title>Google Drive - Quota exceeded</title>Sorry, you can't view or download this "
            "file at this time. Too many users have viewed or downloaded this file recently.",
            "too many people have downloaded it in the last day",
        ),
        ("<title>Sign in - Google Accounts</title>", "it asks to sign in"),
        ("<title>Google Drive - Page Not Found</title>", "the file is not there any more"),
        ("<title>Error\n 5</title><title>more</title>", "its title is 'Error 5"),
        ("", "without a title"),
    ],
)
def test_other_pages_are_told_with_the_way_by_hand(
    server: Any, drive: dict[str, Any], tmp_path: Path, page: str, reason: str
) -> None:
    url = server.answer("/uc", page.encode(), kind="text/html")
    with pytest.raises(DownloadError) as caught:
        fetch_aug(tmp_path, url=url, **drive)
    said = str(caught.value)
    assert said.startswith("Google Drive answered with a web page instead of the file (" + reason)
    assert said.endswith(
        "open https://drive.google.com/file/d/1PyTdS9Ev_OhsU2WQSQWRxBw8TV8Z27tB/view?usp=sharing "
        f"in a browser and save the file as '{tmp_path / 'aug.csv'}'"
    )
    assert "\n" not in said
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "header"),
    [
        (b"text,label\na,0\n", "'text,label'"),
        (b"org_ind\ttext\tlabel\n", "'org_ind\\ttext\\tlabel'"),
        (b"org_ind,text,label,x\n", "'org_ind,text,label,x'"),
        (b"", "''"),
    ],
)
def test_a_file_with_another_header_is_refused(
    server: Any, drive: dict[str, Any], tmp_path: Path, content: bytes, header: str
) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch_aug(tmp_path, url=server.file("/uc", content), **drive)
    assert f"has the header {header} instead of 'org_ind,text,label'" in str(caught.value)
    assert AUG_PAGE in str(caught.value)
    assert names(tmp_path) == []


def test_an_aug_file_of_someone_else_is_not_overwritten(
    server: Any, drive: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "aug.csv").write_text("text,label\nmine,1\n")
    with pytest.raises(UsageError, match=r"aug\.csv' is another file; choose another folder"):
        fetch_aug(tmp_path, url=server.file("/uc", AUG), **drive)
    assert (tmp_path / "aug.csv").read_text() == "text,label\nmine,1\n"
    assert server.requests == []


@pytest.mark.parametrize("fetch", [fetch_sst2, fetch_aug])
def test_a_folder_that_cannot_be_made_is_a_usage_error(
    server: Any, settings: dict[str, Any], tmp_path: Path, fetch: Any
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write '.*file"):
        fetch(tmp_path / "file", url=server.file("/x", AUG), **settings)
    assert server.requests == []
