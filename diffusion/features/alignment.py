"""Features of a frozen picture encoder, one vector a token of the network, in a folder beside the store (REPA).

The pictures are decoded from the store's own latents, so that crop and size are those that training sees.

`features.npy` holds the vectors of all rows one after the other, (tokens, A) float16; `ends.npy`, (rows,) int64, says
where each row ends; `manifest.json` says of which store, by which encoder. Both arrays are mapped, not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from diffusion.errors import DataError
from diffusion.features.fingerprint import hash_folder
from diffusion.features.store import FeatureStore
from diffusion.files import write_atomically
from diffusion.images import decode_latents, load_vae
from diffusion.images.picture_encoder import PictureEncoder, load_picture_encoder

_FEATURES, _ENDS, _MANIFEST = "features.npy", "ends.npy", "manifest.json"
_REMEDY = "make it with tools/extract_alignment.py"


class AlignmentFeatures:
    """Indexed by the row of the store: (N, A) float16, tokens row by row of the picture.

    Raises:
        DataError: no such folder, or it is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            self.channels = int(self.manifest["channels"])
            self._ends = np.load(self.folder / _ENDS, mmap_mode="r")
            self._features = np.load(self.folder / _FEATURES, mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no alignment features ({error}); {_REMEDY}") from error
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        if self._features.shape != (tokens, self.channels):
            raise DataError(f"{folder} is damaged: {self._features.shape} features for {tokens} tokens; {_REMEDY}")

    def __reduce__(self) -> tuple[type[AlignmentFeatures], tuple[Path]]:
        return AlignmentFeatures, (self.folder,)  # a loading process maps the files itself

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Tensor:
        begin = int(self._ends[row - 1]) if row else 0
        return torch.from_numpy(np.array(self._features[begin : int(self._ends[row])]))

    def require_store(self, store: FeatureStore) -> None:
        """Refuse features of another store.

        Raises:
            DataError: it has other rows, or was extracted otherwise.
        """
        if self.manifest.get("rows_hash") != rows_hash(store):
            raise DataError(f"{self.folder} was made of other pictures than {store.root} holds; {_REMEDY}")


def rows_hash(store: FeatureStore) -> str:
    """What ties features to a store: names, order and buckets of its rows, and how it was extracted."""
    digest = xxhash.xxh3_128(json.dumps(store.fingerprint, sort_keys=True, default=str).encode())
    for key, bucket in zip(store.column("key"), store.buckets()):
        digest.update(f"{key}{bucket}\0".encode())
    return digest.hexdigest()


def write_alignment(folder: Path, rows: Iterable[np.ndarray], manifest: dict[str, Any]) -> None:
    """Write the folder that `AlignmentFeatures` reads; the manifest, written last, makes it whole.

    Args:
        rows: (N, A) a row of the store, in its order.
        manifest: `channels`, `rows_hash`, and what is worth knowing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    ends: list[int] = []
    raw = folder / f"{_FEATURES}.raw"
    with raw.open("wb") as file:
        for row in rows:
            file.write(np.ascontiguousarray(row, dtype=np.float16).tobytes())
            ends.append(len(row) + (ends[-1] if ends else 0))
    shape = (ends[-1], manifest["channels"])
    mapped = np.lib.format.open_memmap(folder / _FEATURES, mode="w+", dtype=np.float16, shape=shape)
    mapped[:] = np.memmap(raw, dtype=np.float16, mode="r", shape=shape)
    mapped.flush()
    raw.unlink()
    np.save(folder / _ENDS, np.array(ends, dtype=np.int64))
    write_atomically(folder / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def extract_alignment(
    store: FeatureStore,
    encoder_folder: str | Path,
    vae_folder: str | Path,
    output: str | Path,
    *,
    device: str | torch.device = "cpu",
    patch_size: int = 2,
    batch_size: int = 32,
) -> AlignmentFeatures:
    """Encode every picture of a store and write the folder that `repa.features` names.

    Args:
        encoder_folder: see `load_picture_encoder`. vae_folder: the VAE (or its pipeline) that made the store.
        patch_size: latent pixels a token side of the network that will be trained.
    Raises:
        CheckpointError: an encoder or VAE that cannot be used. DataError: damaged features.
    """
    encoder, vae = load_picture_encoder(encoder_folder, device), load_vae(vae_folder, device=device)
    manifest = {
        "channels": encoder.channels,
        "rows_hash": rows_hash(store),
        "store": store.root,
        "encoder": str(encoder_folder),
        "encoder_hash": hash_folder(Path(encoder_folder)),
        "patch_size": patch_size,
    }
    write_alignment(Path(output), _encoded(store, encoder, vae, patch_size, batch_size), manifest)
    return AlignmentFeatures(output)


def _encoded(
    store: FeatureStore, encoder: PictureEncoder, vae: Any, patch_size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Features of every row in order; neighbours of one size go through the encoder together."""
    buckets = store.buckets()
    for _, group in groupby(range(len(store)), key=lambda row: buckets[row]):
        rows = list(group)
        for begin in range(0, len(rows), batch_size):
            latents = torch.stack([store.latents(row)[0].float() for row in rows[begin : begin + batch_size]])
            grid = (latents.shape[-2] // patch_size, latents.shape[-1] // patch_size)
            pixels = decode_latents(vae, latents * vae.config.scaling_factor)
            yield from encoder(pixels, grid).half().cpu().numpy()
