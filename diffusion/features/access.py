"""Files of a store on the local disk or behind an fsspec URL (http, s3, gs, hf, ...).

Remote files are copied once into a cache, under the hash of their content, and mapped from there. The manifest is
fetched anew each time, so a store that has grown is seen.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.features.manifest import REMEDY
from diffusion.files import TEMPORARY, hash_file

CACHE_VARIABLE = "PIXART_CACHE"


def is_url(root: object) -> bool:
    return "://" in str(root)


class StoreFiles:
    """The files of one store, as local paths.

    Args:
        root: folder, or an fsspec URL such as https://host/store, s3://bucket/store.
        cache: folder for copies of remote files; None = $PIXART_CACHE, else ~/.cache/pixart.
    """

    def __init__(self, root: str | Path, cache: str | Path | None = None) -> None:
        self.url = str(root).rstrip("/") if is_url(root) else None
        if self.url is None:
            self.folder = Path(root)
        else:
            base = Path(cache or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pixart")
            self.folder = base / "stores" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def small(self, name: str) -> Path:
        """Local path of a small file, fetched anew; it may not exist."""
        if self.url is not None:
            self._fetch(name, self.folder / name, None)
        return self.folder / name

    def checked(self, entry: Mapping[str, Any], *, verify: bool = False) -> Path:
        """Local path of a file that the manifest lists with name, bytes and hash.

        Raises:
            DataError: missing, truncated, or (when just fetched, or with `verify`) damaged.
        """
        path, name = self.folder / entry["name"], f"{self}/{entry['name']}"
        if self.url is not None:
            path = self.folder / f"{entry['xxh3_128']}-{entry['name']}"
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                self._fetch(entry["name"], path, entry)
        if not path.is_file():
            raise DataError(f"{name} is missing; {REMEDY}")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}: truncated; {REMEDY}")
        if verify and hash_file(path) != entry["xxh3_128"]:
            raise DataError(f"{name} is damaged (its hash differs); {REMEDY}")
        return path

    def _fetch(self, name: str, target: Path, entry: Mapping[str, Any] | None) -> None:
        """Copy a remote file: aside first, then renamed, so that many workers may fetch at once."""
        import fsspec

        self.folder.mkdir(parents=True, exist_ok=True)
        handle, aside_name = tempfile.mkstemp(prefix=TEMPORARY, dir=self.folder)
        os.close(handle)
        aside = Path(aside_name)
        try:
            system, path = fsspec.url_to_fs(f"{self.url}/{name}")
            system.get_file(path, str(aside))
            if entry is not None and (aside.stat().st_size != entry["bytes"] or hash_file(aside) != entry["xxh3_128"]):
                raise DataError(f"{self.url}/{name} arrived damaged; try again, or verify the store where it lies")
            aside.replace(target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            if entry is not None:
                raise DataError(f"{self.url}/{name} is missing; {REMEDY}") from None
        except DataError:
            raise
        except Exception as error:  # each protocol raises its own classes: refused, timed out, not installed, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.url}/{name} cannot be fetched ({reason}); check the URL and the network") from error
        finally:
            aside.unlink(missing_ok=True)
