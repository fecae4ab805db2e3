"""Pictures with captions on disk: a Hugging Face ImageFolder with metadata.jsonl, or `x.jpg` beside `x.txt`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.images import IMAGE_SUFFIXES
from diffusion.text import clean_caption

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """A picture file, its captions (cleaned, at least one) and further columns."""

    key: str
    path: Path
    captions: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)


def read_folder(root: str | Path, splits: Sequence[str] | None = None) -> list[Sample]:
    """Samples of a folder, in a fixed order.

    Args:
        splits: keep rows whose `split` is one of these; None = all.
    Raises:
        DataError: no such folder, a broken row (with its line), a picture without caption or the reverse, two
            pictures of one name, or nothing left.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of pictures with {METADATA} or with .txt captions")
    pictures = _pictures(root)
    rows = list(_metadata_rows(root)) if (root / METADATA).is_file() else list(_sidecar_rows(root, pictures))
    samples: dict[str, Sample] = {}
    for place, row in rows:
        sample = _sample(root, place, row, pictures)
        if sample.key in samples:
            raise DataError(f"{place}: picture {sample.key!r} is listed twice; remove one row")
        samples[sample.key] = sample
    unlisted = sorted(pictures.keys() - samples.keys())
    if unlisted:
        raise DataError(
            f"{root}: {len(unlisted)} pictures have no caption, the first {unlisted[0]!r}; caption or remove them"
        )
    chosen = [s for s in samples.values() if splits is None or s.attributes.get("split") in splits]
    if not chosen:
        raise DataError(f"{root}: no pictures" + (f" in split {', '.join(splits)}" if splits else ""))
    return chosen


def _pictures(root: Path) -> dict[str, Path]:
    """Key -> path of all pictures, hidden ones left out."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        key = _key(path, root)
        if key in found:
            raise DataError(f"{found[key]} and {path} have the same name after Unicode normalisation; rename one")
        found[key] = path
    return found


def _key(path: Path, root: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())


def _metadata_rows(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path = root / METADATA
    # Only a line feed ends a row: str.splitlines would also cut at U+2028, which may stand inside a caption.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{place} has no file_name; a row is {{'file_name': 'a.png', 'text': 'a caption'}}")
        yield place, row


def _sidecar_rows(root: Path, pictures: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    texts = {path.with_suffix("") for path in root.rglob("*.txt")}
    for path in pictures.values():
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise DataError(f"{path} has no caption; write {caption.name} beside it, or a {METADATA}")
        texts.discard(path.with_suffix(""))
        text = caption.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        yield str(caption), {"file_name": path.relative_to(root).as_posix(), "text": text}
    if texts:
        orphan = min(texts).with_suffix(".txt")
        raise DataError(f"{orphan} is a caption without a picture; add the picture or remove the file")


def _sample(root: Path, place: str, row: dict[str, Any], pictures: dict[str, Path]) -> Sample:
    relative = Path(row["file_name"])
    outside = "\0" in row["file_name"] or relative.is_absolute() or ".." in relative.parts
    if outside or not (root / relative).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{place}: file_name {row['file_name']!r} leaves {root}; keep pictures inside the folder")
    key = unicodedata.normalize("NFC", relative.as_posix())
    if key not in pictures:
        raise DataError(f"{place}: picture {row['file_name']!r} does not exist in {root}")
    text, more = row.get("text"), row.get("captions")
    texts = ([] if text is None else [text]) + ([] if more is None else more if isinstance(more, list) else [None])
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: text must be a string and captions a list of strings")
    captions = tuple(dict.fromkeys(cleaned for text in texts if (cleaned := clean_caption(text))))
    if not captions:
        raise DataError(f"{place}: {row['file_name']!r} has no caption; give it a text")
    attributes = {k: _as_text(v) for k, v in row.items() if k not in ("file_name", "text", "captions")}
    return Sample(key, pictures[key], captions, attributes)


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
