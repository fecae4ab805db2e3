"""Stores to and from other layouts: the original's npz and npy files, and webdataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffusion.errors import DataError
from diffusion.features.maintenance import rows_of
from diffusion.features.manifest import MANIFEST
from diffusion.features.original import (
    feature_names,
    read_caption_npz,
    read_latents_npy,
    write_caption_npz,
    write_latents_npy,
)
from diffusion.features.rows import FeatureRow
from diffusion.features.sources import Source
from diffusion.features.sources.sample import inside
from diffusion.features.store import FeatureStore
from diffusion.features.writer import FeatureStoreWriter
from diffusion.files import write_atomically

_CAPTIONS, _LATENTS = "caption_feature_wmask", "img_vae_features_{size}resolution/noflip"
_LATENTS_MS = "img_vae_fatures_{size}_multiscale/ms"  # the original's spelling
STORE_MEMBER = "store.json"


def export_original(root: str | Path, out: str | Path, max_length: int = 120) -> int:
    """Write a store as the original's InternalData or, with buckets, InternalDataMS; returns the number of pictures.

    Of several captions of a picture the first is written: the layout has room for one.

    Raises:
        DataError: no store, an output folder that is not empty, two pictures whose files would have one name, or one
            whose key leaves the folder.
    """
    store, out = FeatureStore(root), _empty(out)
    scaled = store.fingerprint.get("multi_scale", len(set(store.buckets())) > 1)
    size = store.fingerprint.get("image_size", store.buckets()[0][0])
    latents = out / (_LATENTS_MS if scaled else _LATENTS).format(size=size)
    items, names = [], dict[str, str]()
    for row in rows_of(store):
        name = feature_names(row.key)[0]
        if name in names:
            raise DataError(f"{names[name]!r} and {row.key!r} would both be {name}.npy in the original's layout")
        names[name] = row.key
        for folder in (out / _CAPTIONS, latents):
            inside(folder, name, f"{root}, picture {row.key!r}").parent.mkdir(parents=True, exist_ok=True)
        write_caption_npz(out / _CAPTIONS / f"{name}.npz", row.caption_embeds[0], max_length)
        write_latents_npy(latents / f"{name}.npy", row.latents_mean, row.latents_std)
        height, width = row.image_size
        items.append({"height": height, "width": width, "ratio": height / width, "path": row.key})
        items[-1]["prompt"] = row.captions[0]
    index = out / ("partition_filter" if scaled else "partition") / "data_info.json"
    index.parent.mkdir(parents=True)
    write_atomically(index, json.dumps(items, indent=1, ensure_ascii=False).encode())
    return len(items)


def import_original(
    source: Source, features: str | Path, out: str | Path, *, image_size: int, multi_scale: bool, max_length: int = 120
) -> int:
    """Pack feature files of the original into a store, without encoding anything; returns the number of rows.

    Args:
        source: pictures and captions, for keys, texts and attributes; the pictures are not read.
        features: folder with the caption and latent folders of any of the original's layouts.
    Raises:
        DataError: a feature file is missing or damaged, or `out` holds a store.
    """
    if (Path(out) / MANIFEST).exists():
        raise DataError(f"{out} holds a store already; choose another folder")
    files = _index_files(Path(features))
    writer: FeatureStoreWriter | None = None
    for sample in source.samples:
        paths = [next((files[kind][n] for n in feature_names(sample.key) if n in files[kind]), None) for kind in files]
        if None in paths:
            kind = list(files)[paths.index(None)]
            raise DataError(f"{features}: no feature file {feature_names(sample.key)[0]}{kind} of {sample.key!r}")
        caption, latents = paths
        assert caption is not None
        assert latents is not None
        embeds = read_caption_npz(caption, max_length)
        mean, std = read_latents_npy(latents)
        bucket = (mean.shape[1] * 8, mean.shape[2] * 8)
        size = _image_size(sample.attributes, bucket)
        row = FeatureRow(
            key=sample.key, image_size=size, bucket=bucket, crop_box=(0.0, 0.0, float(size[1]), float(size[0])),
            latents_mean=mean, latents_std=std, captions=list(sample.captions[:1]), caption_embeds=[embeds],
            attributes=dict(sample.attributes), record_hash=sample.record_hash(),
        )  # fmt: skip
        if writer is None:
            fingerprint = {"imported_from": "original", "image_size": image_size, "multi_scale": multi_scale}
            fingerprint["max_length"] = max_length
            # The original stores no T5(""); training on such a store needs null_caption='stored'.
            writer = FeatureStoreWriter(out, fingerprint, torch.zeros(1, embeds.shape[1]), dtype="fp32")
        writer.add(row)
    assert writer is not None  # open_source refuses an empty source
    writer.close()
    return writer.num_rows


def _image_size(attributes: Any, bucket: tuple[int, int]) -> tuple[int, int]:
    try:
        return int(attributes["height"]), int(attributes["width"])
    except (KeyError, ValueError):
        return bucket


def _index_files(root: Path) -> dict[str, dict[str, Path]]:
    """Feature files by suffix and name; the name is the path below the innermost known folder."""
    found: dict[str, dict[str, Path]] = {".npz": {}, ".npy": {}}
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of feature files")
    for path in sorted(root.rglob("*.np[yz]")):
        parts = path.relative_to(root).with_suffix("").parts
        # caption_feature_wmask/a/b_c -> a/b_c; img_vae_features_256resolution/noflip/a/b_c -> a/b_c
        start = max((i + 1 for i, part in enumerate(parts[:-1]) if _is_feature_folder(part)), default=0)
        found[path.suffix][("/".join(parts[start:]))] = path
    return found


def _is_feature_folder(name: str) -> bool:
    starts = ("caption_feature", "img_vae_", "train_vae_", "noflip", "ms")
    return name.startswith(starts) or name.endswith("resolution")


def export_webdataset(root: str | Path, out: str | Path, rows_per_tar: int = 1000) -> int:
    """Write a store as tars of `NAME.json` (texts, sizes) and `NAME.safetensors` (features); returns the rows.

    Raises:
        DataError: no store, or an output folder that is not empty.
    """
    store, out = FeatureStore(root), _empty(out)
    out.mkdir(parents=True, exist_ok=True)
    head = {name: store.manifest[name] for name in ("dtype", "fingerprint")}
    for start in range(0, len(store), rows_per_tar):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            _add(tar, STORE_MEMBER, json.dumps(head).encode())
            _add(tar, "null_caption.safetensors", save({"null_caption": store.null_caption}))
            for index in range(start, min(start + rows_per_tar, len(store))):
                row = store.row(index)
                tensors = {"latents_mean": row.latents_mean, "latents_std": row.latents_std}
                tensors |= {f"caption_{n}": embeds for n, embeds in enumerate(row.caption_embeds)}
                if row.control_mean is not None and row.control_std is not None:
                    tensors |= {"control_mean": row.control_mean, "control_std": row.control_std}
                texts = {name: value for name, value in row.__dict__.items() if name not in _TENSORS}
                _add(tar, f"{index:09d}.json", json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace"))
                _add(tar, f"{index:09d}.safetensors", save({name: t.contiguous() for name, t in tensors.items()}))
        write_atomically(out / f"{start // rows_per_tar:06d}.tar", buffer.getvalue())
    return len(store)


_TENSORS = ("latents_mean", "latents_std", "caption_embeds", "control_mean", "control_std")


def import_webdataset(root: str | Path, out: str | Path) -> int:
    """The inverse of `export_webdataset`; returns the number of rows.

    Raises:
        DataError: no tars, damaged ones, of different stores, or `out` holds a store.
    """
    if (Path(out) / MANIFEST).exists():
        raise DataError(f"{out} holds a store already; choose another folder")
    paths = sorted(Path(root).glob("*.tar"))
    if not paths:
        raise DataError(f"{root} holds no .tar; give a folder written by `feature_store.py export --to webdataset`")
    writer: FeatureStoreWriter | None = None
    for path in paths:
        members = _members(path)
        try:
            head = json.loads(members.pop(STORE_MEMBER))
            null_caption = load(members.pop("null_caption.safetensors"))["null_caption"]
            rows = list(_rows(members))
        except (KeyError, ValueError, TypeError, SafetensorError) as error:
            raise DataError(f"{path} is no tar of features ({error}); export it again") from error
        if writer is None:
            writer = FeatureStoreWriter(out, head["fingerprint"], null_caption, dtype=head["dtype"])
        elif head["fingerprint"] != writer.manifest["fingerprint"]:
            raise DataError(f"{path} belongs to another store than {paths[0]}; import them one by one")
        for row in rows:
            writer.add(row)
    assert writer is not None
    writer.close()
    return writer.num_rows


def _members(path: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is no tar of features ({error}); export it again") from error


def _rows(members: dict[str, bytes]) -> Iterator[FeatureRow]:
    for name in sorted(name for name in members if name.endswith(".json")):
        values = json.loads(members[name])
        tensors = load(members[name.replace(".json", ".safetensors")])
        for field in ("image_size", "bucket", "crop_box"):
            values[field] = tuple(values[field])
        embeds = [tensors[f"caption_{n}"] for n in range(len(values["captions"]))]
        yield FeatureRow(
            latents_mean=tensors["latents_mean"],
            latents_std=tensors["latents_std"],
            caption_embeds=embeds,
            control_mean=tensors.get("control_mean"),
            control_std=tensors.get("control_std"),
            **values,
        )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # with time 0: the same store gives the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _empty(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another folder")
    return folder
