"""Errors that a user can mend. Each carries the exit code of the command line.

Every message is one sentence: what is wrong, where (file, line), what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TwoStageError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class TwoStageWarning(UserWarning):
    """Something that a user should know and that does not stop the run."""


class UsageError(TwoStageError):
    """A setting that cannot be used: a flag of the command line or a field of a config."""

    exit_code = 2


class DataError(TwoStageError):
    """A table or its labels cannot be used."""

    exit_code = 3


class ModelError(TwoStageError):
    """A model folder, its configuration, weights or tokenizer cannot be used."""

    exit_code = 3


class DownloadError(TwoStageError):
    """The network or a download failed."""

    exit_code = 4


class PartialOutputError(TwoStageError):
    """The work ended before it was whole; what there is was written, and is marked as partial."""

    exit_code = 6


class NonFiniteError(TwoStageError):
    """The loss or the gradient became infinite or not a number."""

    exit_code = 7


@contextmanager
def reading_network_settings(kind: type[TwoStageError]) -> Iterator[None]:
    """Turn what httpx has against the environment's proxies and certificates into one sentence."""
    import httpx

    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError, OSError):
        # Whatever is wrong with a proxy's address, that address may hold a password: not said.
        raise kind(
            "the network settings cannot be used; check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and "
            "SSL_CERT_FILE in the environment"
        ) from None


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a UsageError that names the path."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror or error}") from error
