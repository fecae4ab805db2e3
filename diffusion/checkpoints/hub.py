"""Files of the Hugging Face hub: ids, downloads that go on where they stopped, and what to do without a network."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion.errors import CheckpointError, StorageError, first_line

_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
CLIENT_LIBRARIES = (*_HTTP_LIBRARIES, "huggingface_hub")
_ID = re.compile(r"^([\w][\w.-]*/[\w][\w.-]*)(?:/(.+))?$")
_DATASET_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")
# What a file is called and a repository is not; a version number may end the name of either.
_FILE_NAME = re.compile(
    r"\.(pth|pt|bin|ckpt|safetensors|parquet|arrow|jsonl?|csv|tsv|txt|tar|gz|tgz|zip|png|jpe?g|webp|py)$", re.IGNORECASE
)
_PATIENCE_S = 5.0  # for an answer of the hub; HF_HUB_ETAG_TIMEOUT, the client's own variable for that, wins
_REMEMBERED_S = 30.0  # a model has several parts, and each would wait for a hub that is silent
_silent: dict[str, tuple[float, str]] = {}  # address -> when it did not answer, and why


def parse_hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name/path/of/file` as (repository, file or None); None for what is a local path.

    A path whose first folder exists here is local, even when the rest of it is missing, and so is `folder/file.pth`.
    """
    text = str(source)
    match = _ID.match(text)
    if match is None or _is_local(text) or (match[2] is None and _FILE_NAME.search(text)):
        return None
    return match[1], match[2]


def is_dataset_id(source: str) -> bool:
    """Whether a data set of the hub can be meant: `owner/name`, or `name` alone, as the oldest ones are called."""
    return _DATASET_ID.match(source) is not None and not _is_local(source) and not _FILE_NAME.search(source)


def _is_local(text: str) -> bool:
    return Path(text).exists() or ("/" in text and Path(text.split("/", 1)[0]).exists())


def no_such_path(path: str | Path) -> str:
    """The first half of an error: what was given is no path here and cannot be a name of the hub."""
    text, hint = str(path), ""
    if text.startswith("~"):
        hint = " (the shell leaves ~ behind = as it is: write $HOME)"
    elif not Path(text).is_absolute():
        hint = f" in {Path.cwd()}"
    return f"{text}: no such folder or file{hint}"


def why_unreachable() -> str | None:
    """Why nothing can be asked of the hub, in a few words; None where it answers, whatever it says.

    Asked before each call of the client, which waits for a silent hub without limit and asks an absent one for most of
    a minute. A silent hub is not asked again within 30 seconds.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, unset it to ask"
    address = endpoint()
    if address in _silent and time.monotonic() - _silent[address][0] < _REMEMBERED_S:
        return _silent[address][1]
    try:
        get_session().head(address, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _PATIENCE_S))
    except Exception as error:
        if not _of_http(error):
            raise
        _silent[address] = (time.monotonic(), first_line(error))
        return _silent[address][1]
    return None


def not_at_hand(repo: str, what: str, reason: str, *, cache: str | Path, kind: str = "") -> str:
    """The error of what is neither here nor in the cache while the hub does not answer.

    Args:
        what: the files, in words. reason: see `why_unreachable`. cache: the folder that lacks them.
        kind: the hub's path of repositories that are no models ("datasets/").
    """
    return (
        f"{repo} is no file or folder here, and {endpoint()} could not be reached for {what} ({reason}); fetch "
        f"{endpoint()}/{kind}{repo} elsewhere and give its local path, or bring the cache of a machine that has it to "
        f"{cache} (with HF_HUB_OFFLINE=1 nothing is asked), or set HF_ENDPOINT to a mirror"
    )


def hub_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """One file of a repository, in the hub's cache (HF_HOME).

    Raises:
        CheckpointError: no such repository or file, or no network; the message says what to put where.
    """
    from huggingface_hub import hf_hub_download

    with explained(repo, name) as local:
        return Path(hf_hub_download(repo, name, revision=revision, endpoint=endpoint(), local_files_only=local))


def hub_folder(repo: str, patterns: Sequence[str], what: str, *, revision: str | None = None) -> Path:
    """The files of a repository that match, in the hub's cache.

    Args:
        what: the files, in words.
    Raises:
        CheckpointError: no such repository, nothing matches, or no network.
    """
    from huggingface_hub import snapshot_download

    with explained(repo, what) as local:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), endpoint=endpoint(), local_files_only=local
        )
    folder = Path(found)
    if not any(folder.rglob("*")):
        raise CheckpointError(f"{repo} has no {what}; look at {endpoint()}/{repo}/tree/main")
    return folder


def cached_file(repo: str, name: str) -> Path | None:
    """As `hub_file`, where the hub's cache holds it already; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def explained(repo: str, what: str, target: Path | None = None) -> Iterator[bool]:
    """Turn the hub client's errors into one line that says what to do; yields whether only its cache can be read.

    Args:
        target: where the file belongs on this machine, the cache being of no use; None = the hub's cache.
    """
    from huggingface_hub import constants, errors

    place = f"put it at {target}" if target is not None else f"give its local path instead of {repo}"
    by_hand = f"fetch {what} from {endpoint()}/{repo} elsewhere and {place}, or set HF_ENDPOINT to a mirror"
    reason = why_unreachable()
    if reason is not None and target is not None:
        raise CheckpointError(f"{endpoint()} could not be reached for {what} of {repo} ({reason}); {by_hand}")
    try:
        yield reason is not None
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise CheckpointError(
            f"{repo} is gated or disabled; accept its terms on its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no such revision; see {endpoint()}/{repo}/commits") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo} is neither a local path nor a repository on {endpoint()}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cache = constants.HF_HUB_CACHE
        raise CheckpointError(not_at_hand(repo, what, reason or first_line(error), cache=cache)) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no {what}; look at {endpoint()}/{repo}/tree/main") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is neither a local path nor the id of a repository ({error})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise StorageError(f"{what} of {repo} could not be written ({error}); free some disk space") from error
        if not _of_http(error):
            raise
        raise CheckpointError(f"{what} of {repo}: {first_line(error)}; {by_hand}") from error


def _of_http(error: Exception) -> bool:
    """The client's HTTP library is its own choice, and its connection errors have no class in common."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HTTP_LIBRARIES


def endpoint() -> str:
    """Address of the hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
