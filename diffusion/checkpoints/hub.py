"""Files of the Hugging Face hub: ids, downloads that go on where they stopped, and what to do without a network."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion.errors import CheckpointError, StorageError, first_line

_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
CLIENT_LIBRARIES = (*_HTTP_LIBRARIES, "huggingface_hub")
_ID = re.compile(r"^([\w][\w.-]*/[\w][\w.-]*)(?:/(.+))?$")


def parse_hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name/path/of/file` as (repository, file or None); None for what is a local path.

    A path whose first folder exists here is local, even when the rest of it is missing.
    """
    text = str(source)
    match = _ID.match(text)
    if match is None or Path(text).exists() or Path(text.split("/", 1)[0]).exists():
        return None
    return match[1], match[2]


def hub_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """One file of a repository, in the hub's cache (HF_HOME).

    Raises:
        CheckpointError: no such repository or file, or no network; the message says what to put where.
    """
    from huggingface_hub import hf_hub_download

    with explained(repo, name, None):
        return Path(hf_hub_download(repo, name, revision=revision, endpoint=endpoint()))


def hub_folder(repo: str, patterns: Sequence[str], what: str, *, revision: str | None = None) -> Path:
    """The files of a repository that match, in the hub's cache.

    Args:
        what: the files, in words.
    Raises:
        CheckpointError: no such repository, nothing matches, or no network.
    """
    from huggingface_hub import snapshot_download

    with explained(repo, what, None):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), endpoint=endpoint()))
    if not any(folder.rglob("*")):
        raise CheckpointError(f"{repo} has no {what}; look at {endpoint()}/{repo}/tree/main")
    return folder


def cached_file(repo: str, name: str) -> Path | None:
    """As `hub_file`, where the hub's cache holds it already; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def explained(repo: str, what: str, target: Path | None) -> Iterator[None]:
    """Turn the hub client's errors into one line that says what to do.

    Args:
        target: where the file belongs on this machine; None = the hub's cache.
    """
    from huggingface_hub import errors

    place = f"put it at {target}" if target is not None else f"give its local path instead of {repo}"
    by_hand = f"fetch {what} from {endpoint()}/{repo} elsewhere and {place}, or set HF_ENDPOINT to a mirror"
    try:
        yield
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise CheckpointError(
            f"{repo} is gated or disabled; accept its terms on its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no such revision; see {endpoint()}/{repo}/commits") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo} is neither a local path nor a repository on {endpoint()}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(f"{what} of {repo} is not here and cannot be fetched; {by_hand}") from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no {what}; look at {endpoint()}/{repo}/tree/main") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is neither a local path nor the id of a repository ({error})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise StorageError(f"{what} of {repo} could not be written ({error}); free some disk space") from error
        # The client's HTTP library is its own choice, and its connection errors have no class in common.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise CheckpointError(f"{what} of {repo}: {first_line(error)}; {by_hand}") from error


def endpoint() -> str:
    """Address of the hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
