"""What a store says about itself, and the one place that knows its format versions.

Version 1 had no index and no hashes of sources; it is read as it is, and `migrate_store` brings it to version 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.files import write_atomically

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
NULL_CAPTION = "null_caption.safetensors"
INDEX = "index.arrow"
REJECTED = "rejected.jsonl"
REMEDY = "extract again with tools/extract_features.py"
_NEEDED = {"dtype", "caption_channels", "fingerprint", "complete", "shards"}
_SHARD = {"name": str, "rows": int, "bytes": int, "xxh3_128": str}


def read_manifest(path: Path, root: object = None) -> dict[str, Any]:
    """Content of a manifest file.

    Args:
        root: the store as the user named it, for messages; None = the file's folder.
    Raises:
        DataError: missing, damaged or of a newer format.
    """
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{root or path.parent} is no feature store: {MANIFEST} is missing; {REMEDY}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); {REMEDY}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise DataError(f"{path} has format version {version}, this program reads {known}; {REMEDY}")
    missing = _NEEDED - set(manifest)
    if missing:
        raise DataError(f"{path} is damaged (without {', '.join(sorted(missing))}); {REMEDY}")
    if not isinstance(manifest["shards"], list) or not all(_is_shard(shard) for shard in manifest["shards"]):
        raise DataError(f"{path} is damaged (its list of shards); {REMEDY}")
    if not isinstance(manifest["fingerprint"], dict) or not isinstance(manifest["caption_channels"], int):
        raise DataError(f"{path} is damaged (its fingerprint or caption_channels); {REMEDY}")
    return manifest


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a store; from then on it is what the manifest says."""
    write_atomically(root / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read_rejections(path: Path) -> list[dict[str, Any]]:
    """The pictures that a `REJECTED` file lists, `Rejected` as objects; none where there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def _is_shard(shard: Any) -> bool:
    right = isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in _SHARD.items())
    # A name is a file of the store's folder, never a path elsewhere.
    return right and shard["rows"] > 0 and Path(shard["name"]).name == shard["name"] and "\0" not in shard["name"]


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; the fields of `wanted` and those only in `stored`."""
    return [
        f"{name} ({stored.get(name)!r}, now {wanted.get(name)!r})"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]


def check_fingerprint(root: object, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse features made by other encoders or settings.

    Raises:
        DataError: every field that differs.
    """
    differing = differences(stored, wanted)
    if differing:
        raise DataError(f"{root} holds features made otherwise: {', '.join(differing)}; extract into another folder")
