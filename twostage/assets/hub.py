"""Models by their name on the Hugging Face Hub, such as `bert-base-uncased`.

A model is the files that `model_folder.py` lists. Nothing else of a repository is ever downloaded;
above all not `pytorch_model.bin`, a pickle, which can run code when it is read.

The files go into the user's own cache, which other tools share, through huggingface_hub. It reads
HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN by itself. The cache is looked at
first, without the network. Another tool may have cached some of the files only, so configuration,
weights and tokenizer are looked for. (A file of settings that it left out cannot be told from one
that the model does not have.) The weights are downloaded after all other files.
"""

import errno
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import DownloadError, ModelError, TwoStageError, UsageError, writing_to
from ..model_folder import (
    ADAPTERS,
    CONFIG,
    EXPECTED,
    INDEX,
    TOKENIZER_SETTINGS,
    TOKENIZERS,
    WEIGHTS,
    check_folder,
    explain_files,
    shard_names,
    weight_files,
)

SMALL_FILES = (CONFIG, *TOKENIZER_SETTINGS, *TOKENIZERS)

_CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


def find_model(
    name: str, *, say: Callable[[str], None] = print, show_progress: bool = False
) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's model of that name.

    say: gets one line before a download, and only then

    Raises ModelError for what cannot be a model, DownloadError where it cannot be had, and
    UsageError when the cache cannot be written.
    """
    # os.path answers for what can be no path at all, where Path raises.
    if os.path.isdir(name):
        check_folder(Path(name), hides_hub_name=not _is_path(name))
        return Path(name)
    if _is_path(name) or os.path.exists(name):
        if os.path.isfile(name):
            check_folder(Path(name))
        raise ModelError(
            f"there is no model folder '{name}'; {EXPECTED} or the name of a model on the Hugging "
            "Face Hub"
        )
    return _find_on_hub(name, say, show_progress)


def fetch_model(
    name: str,
    folder: Path | None = None,
    *,
    say: Callable[[str], None] = print,
    show_progress: bool = False,
) -> Path:
    """The hub's model of that name, in `folder` if one is given, else in the user's cache.

    Nothing is done when it is there already. Raises ModelError and DownloadError as `find_model`
    does, and UsageError when the cache or `folder` cannot be written or holds another model.
    """
    if _is_path(name):
        raise ModelError(
            f"'{name}' is not the name of a model on the Hugging Face Hub; give one such as "
            "bert-base-uncased or owner/name"
        )
    if folder is None:
        return _find_on_hub(name, say, show_progress)
    if _is_complete(folder) and _find_in_cache(name) is None:
        return folder  # and nothing here can tell whether it is another model's
    source = _find_on_hub(name, say, show_progress)
    weights = [path.name for path in weight_files(source)]
    if weights != [WEIGHTS]:
        weights.append(INDEX)
    present = [file for file in SMALL_FILES if (source / file).is_file()] + weights
    for file in (*SMALL_FILES, WEIGHTS, INDEX, *weights):
        if (folder / file).exists() and not (
            file in present and filecmp.cmp(source / file, folder / file, shallow=False)
        ):
            raise UsageError(f"'{folder / file}' is not that of {name}; choose another folder")
    missing = [file for file in present if not (folder / file).exists()]
    if not missing:
        return folder
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that whole files are moved in, the weights last.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".copy-") as temporary:
            for file in missing:
                shutil.copyfile(source / file, Path(temporary) / file)
            for file in missing:
                (Path(temporary) / file).replace(folder / file)
    return folder


def _is_path(name: str) -> bool:
    """Whether a name is written as a path is, so that no model on the hub can be meant."""
    return (
        Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
    )


def _is_complete(folder: Path) -> bool:
    try:
        files = [folder / CONFIG, *weight_files(folder)]
    except ModelError:  # an index without its files
        return False
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZERS)
    return has_tokenizer and all(file.is_file() for file in files)


def _find_on_hub(name: str, say: Callable[[str], None], show_progress: bool) -> Path:
    from huggingface_hub import constants

    cached = _find_in_cache(name)
    if cached is not None and _is_complete(cached):
        return cached
    lacks, other = _explain_cached(cached)
    if constants.HF_HUB_OFFLINE:
        where = f"in {constants.HF_HUB_CACHE}"
        what = f"{name} is {where} without {lacks}" if lacks else f"{name} is not {where}"
        remedy = other or (
            f"unset it, or run `twostage fetch {name}` with a network and the same cache"
        )
        raise DownloadError(f"{what}, and HF_HUB_OFFLINE is set; {remedy}")
    try:
        has_one_file = WEIGHTS in _check_files(name)
        say(
            f"downloading {name} from the Hugging Face Hub into {constants.HF_HUB_CACHE} "
            "(first use)"
        )
        _download(name, has_one_file, show_progress)
    except TwoStageError:
        raise
    except Exception as error:  # the types differ between versions of huggingface_hub
        explained = _explain(name, error)
        held = f"; the cache has it without {lacks}" if lacks else ""
        raise type(explained)(f"{explained}{held}{other and '; '}{other}") from error
    found = _find_in_cache(name)
    if found is None or not _is_complete(found):
        raise DownloadError(f"the download of {name} is not complete; run the command again")
    return found


def _find_in_cache(name: str) -> Path | None:
    """The folder in the cache, if there is one; it may lack files. Asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in (CONFIG, *ADAPTERS):
        try:
            path = try_to_load_from_cache(name, file)
        except HFValidationError:
            raise ModelError(
                f"{name!r} cannot be the name of a model on the Hugging Face Hub, and there is no "
                "folder of that name; expected a folder or a name such as bert-base-uncased"
            ) from None
        if isinstance(path, str):
            return Path(path).parent
    return None


def _explain_cached(folder: Path | None) -> tuple[str, str]:
    """(what a model in the cache lacks, what there is instead), as far as it is known."""
    if folder is None:
        return "", ""
    names = {path.name for path in folder.iterdir()}
    if not names & {WEIGHTS, INDEX}:
        return WEIGHTS, explain_files(names, folder)
    if CONFIG not in names:
        return CONFIG, ""
    if not names & {*TOKENIZERS}:
        return " or ".join(TOKENIZERS), ""
    return "some of its files of weights", ""


def _check_files(name: str) -> set[str]:
    """The names of the model's files. Raises ModelError if the model cannot be used."""
    from huggingface_hub import HfApi

    files = {file.rfilename for file in HfApi().model_info(name).siblings or ()}
    if CONFIG not in files:
        why = (not files & {WEIGHTS, INDEX} and explain_files(files)) or "choose another model"
        raise ModelError(f"{name} on the Hugging Face Hub has no {CONFIG}; {why}")
    if not files & set(TOKENIZERS):
        raise ModelError(
            f"{name} on the Hugging Face Hub has neither {' nor '.join(TOKENIZERS)}; choose "
            "another model, or make a folder of your own with one of them"
        )
    if not files & {WEIGHTS, INDEX}:
        why = explain_files(files) or "choose another model"
        raise ModelError(f"{name} on the Hugging Face Hub has no {WEIGHTS}; {why}")
    return files


def _download(name: str, has_one_file: bool, show_progress: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Silent, or on a terminal only."""

        def __init__(self, *args: object, **settings: object) -> None:
            settings["disable"] = None if show_progress else True
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

    small = [*SMALL_FILES] if has_one_file else [*SMALL_FILES, INDEX]
    folder = Path(snapshot_download(name, allow_patterns=small, tqdm_class=Bar))
    weights = [WEIGHTS] if has_one_file else shard_names(folder / INDEX)
    snapshot_download(name, allow_patterns=[*small, *weights], tqdm_class=Bar)


def _explain(name: str, error: Exception) -> TwoStageError:
    """What went wrong in huggingface_hub, as one sentence; its own run to ten lines."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    where = re.sub(r"^(https?://)[^/@]*@", r"\1", constants.ENDPOINT)  # no password
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{name} is open only to those whom its owner admits; ask at {where}/{name}, then set "
            "HF_TOKEN to a token of yours"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return DownloadError(
            f"there is no model {name} at {where}, or it is private (then set HF_TOKEN); if a "
            f"folder was meant, there is none of that name in {os.getcwd()}"
        )
    if status is not None:
        return DownloadError(
            f"{where} answered with status {status} for {name}; run the command again later"
        )
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return UsageError(
            f"cannot write '{error.filename or constants.HF_HUB_CACHE}': {error.strerror}; free "
            "its disk, or set HF_HOME to another folder"
        )
    return DownloadError(
        f"{name} could not be downloaded from {where} ({type(error).__name__}); check the network "
        "and run the command again, or give a folder that holds the model"
    )
