"""Fetch published files: each from one commit, resumed where it stopped, compared with the hub's sha256."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from diffusion.checkpoints.hub import endpoint, explained
from diffusion.checkpoints.published import PUBLISHED, Published
from diffusion.errors import CheckpointError, StorageError
from diffusion.files import add_file

OUTPUT_DIR = "output/pretrained_models"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit; sha256 is None for small ones, of which the hub states a git hash alone."""

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None
    git_sha1: str

    def problem(self, path: Path) -> str | None:
        """What is wrong with a local copy, or None; a missing one is not wrong but absent."""
        if path.stat().st_size != self.size:
            return f"it has {path.stat().st_size} bytes instead of {self.size}"
        if self.sha256 is not None:
            found, expected = file_sha256(path), self.sha256
        else:
            found, expected = _git_sha1(path), self.git_sha1
        return None if found == expected else f"its checksum is {found[:12]}... instead of {expected[:12]}..."


def target_of(row: Published, name: str, output_dir: str | Path) -> Path:
    """Where a file of a repository belongs on this machine."""
    return Path(output_dir) / row.folder / name


def list_published(output_dir: str | Path) -> list[str]:
    """A line a row: name, whether it is here, licence, address, place. Needs no network."""
    lines = []
    for row in PUBLISHED:
        place = target_of(row, row.pattern, output_dir)
        here = any(path.is_file() for path in place.parent.glob(place.name)) if place.parent.is_dir() else False
        address = f"{endpoint()}/{row.repo}" + ("" if row.pattern == "*" else f" {row.pattern}")
        lines.append(f"{row.name}  [{'here' if here else 'not here'}]  {row.licence}  {address} -> {place}")
    return lines


def download(
    rows: Iterable[Published],
    output_dir: str | Path = OUTPUT_DIR,
    *,
    revision: str = "main",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Fetch every file of the rows that is not here yet or damaged; files that are whole stay untouched.

    Args:
        say: takes a line for each licence and file.
    Returns:
        the local paths, all of them complete and checked.
    Raises:
        CheckpointError: no network (the message says what to put where), no such file, or a checksum that differs.
        StorageError: not enough space; nothing is fetched then.
    """
    plan = []
    for row in rows:
        licence, files = _remote_files(row, revision, output_dir)
        say(f"{row.name}: {row.title}, licence {licence}, from {row.repo}")
        plan += [(file, target_of(row, file.name, output_dir)) for file in files]
    missing = []
    for file, target in plan:
        problem = file.problem(target) if target.is_file() else "absent"
        if problem is None:
            say(f"  {target}: here, checksum right")
        else:
            missing.append((file, target))
    _require_space(missing, Path(output_dir))
    for file, target in missing:
        _fetch(file, target)
        say(f"  {target}: {file.size / 1e6:.1f} MB, checksum right")
    return [target for _, target in plan]


def _remote_files(row: Published, revision: str, output_dir: str | Path) -> tuple[str, list[RemoteFile]]:
    """Licence, with the hub's statement where it differs, and the files of a row at one commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint())
    with explained(row.repo, row.pattern, target_of(row, row.pattern, output_dir)):
        info = api.model_info(row.repo, revision=revision)
        commit = str(info.sha)
        tree = list(api.list_repo_tree(row.repo, recursive=True, revision=commit))
    files = [
        RemoteFile(row.repo, commit, entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile) and fnmatch.fnmatchcase(entry.path, row.pattern)
    ]
    if not files:
        raise CheckpointError(f"{row.repo} has no {row.pattern} any more; look at its list of files on the hub")
    outside = [file.name for file in files if Path(file.name).is_absolute() or ".." in Path(file.name).parts]
    if outside:
        raise CheckpointError(f"{row.repo} names files outside its folder: {', '.join(outside)}")
    card = info.card_data.get("license") if info.card_data is not None else None
    stated = f" (the repository's card says {card})" if card and card != row.licence else ""
    return row.licence + stated, [file for file in files if Path(file.name).name != ".gitattributes"]


def _fetch(file: RemoteFile, target: Path) -> None:
    """One file; an interrupted call leaves a `.part` that the next one continues.

    The hub client's own download starts a file afresh in a new process, so only its HTTP part is used here.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target.parent.mkdir(parents=True, exist_ok=True)
    # The name holds the checksum: what is continued belongs to the same content.
    part = target.with_name(f".{target.name}.{(file.sha256 or file.git_sha1)[:16]}.part")
    with explained(file.repo, file.name, target), part.open("ab") as stream:
        done = stream.tell()
        if done < file.size or file.size == 0:
            http_get(
                hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=endpoint()),
                stream,
                resume_size=done,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.name,
            )
    problem = file.problem(part)
    if problem is not None:
        part.unlink()
        raise CheckpointError(f"{target} arrived damaged ({problem}) and was removed; run the same command again")
    os.replace(part, target)


def _require_space(missing: list[tuple[RemoteFile, Path]], output_dir: Path) -> None:
    needed = sum(file.size for file, _ in missing)
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > 0.98 * free:
        raise StorageError(f"{needed / 1e9:.1f} GB are missing and {place} has {free / 1e9:.1f} GB free; make room")


def file_sha256(path: Path) -> str:
    """By which the hub and others tell published files."""
    return str(add_file(hashlib.sha256(), path).hexdigest())


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    return str(add_file(digest, path).hexdigest())
