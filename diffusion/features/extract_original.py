"""Extraction into the original's layout: one `.npz` a caption, one `.npy` a picture.

A store is smaller and faster to read; this is for programs that read the original's files. A file that exists is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion.devices import choose_device
from diffusion.errors import DataError
from diffusion.features.extract import Encoders, refuse_too_many, write_behind
from diffusion.features.manifest import REJECTED
from diffusion.features.original import feature_names, write_caption_npz, write_latents_npy
from diffusion.features.rows import FeatureRow
from diffusion.features.sources import Rejected, Sample, Source
from diffusion.features.stages import Block, EncodedBlock, ExtractionSettings, encode_blocks
from diffusion.files import write_atomically
from diffusion.ranks import Ranks

_BLOCK = 256


@dataclass(frozen=True)
class OriginalTarget:
    """Where files go, as the original's tools put them.

    Args:
        captions: folder of STEM.npz; None = no captions.
        pictures: folder of `{size}resolution/noflip/STEM.npy`, or with multi_scale `ms/FOLDER_STEM.npy`; None = none.
    """

    captions: Path | None
    pictures: Path | None

    def caption_path(self, key: str) -> Path:
        assert self.captions is not None
        return self.captions / f"{feature_names(key)[-1]}.npz"

    def picture_path(self, key: str, settings: ExtractionSettings) -> Path:
        assert self.pictures is not None
        if settings.multi_scale:
            return self.pictures / "ms" / f"{feature_names(key)[1 if '/' in key else 0]}.npy"
        return self.pictures / f"{settings.image_size}resolution" / "noflip" / f"{feature_names(key)[-1]}.npy"


def extract_original(
    source: Source,
    target: OriginalTarget,
    pretrained: str | Path,
    settings: ExtractionSettings,
    *,
    device: str = "auto",
    max_rejected: float = 0.01,
) -> dict[str, int]:
    """Write the original's feature files; under torchrun the processes share the work.

    Of several captions of a picture, the first is stored, as this layout has room for one.

    Returns:
        counts: captions and pictures written, rejected, captions_cut, enlarged.
    Raises:
        DataError: two pictures whose files would have one name, or too many rejections. CheckpointError.
    """
    ranks = Ranks(device)
    try:
        chosen = choose_device(device if ranks.world_size == 1 else str(ranks.device))
        encoders, counts = Encoders.find(pretrained), {"captions": 0, "pictures": 0, "captions_cut": 0, "enlarged": 0}
        rejected: list[Rejected] = list(source.rejected)
        if target.captions is not None:
            todo = _missing(source.samples, target.caption_path, ranks)
            encoder = encoders.load_text(chosen, settings) if todo else None
            first = [Sample(s.key, s.picture, s.captions[:1]) for s in todo]

            def write_caption(row: FeatureRow) -> None:
                write_caption_npz(target.caption_path(row.key), row.caption_embeds[0], settings.max_length)

            rejected += _run(first, settings, encoder, None, write_caption, counts, "captions", ranks)
        if target.pictures is not None:
            todo = _missing(source.samples, lambda key: target.picture_path(key, settings), ranks)
            vae = encoders.load_vae(chosen, settings) if todo else None

            def write_picture(row: FeatureRow) -> None:
                write_latents_npy(target.picture_path(row.key, settings), row.latents_mean, row.latents_std)

            rejected += _run(todo, settings, None, vae, write_picture, counts, "pictures", ranks)
        ranks.barrier()
        _report(rejected, source, target, settings, max_rejected, ranks)
        return {**counts, "rejected": len(rejected)}
    finally:
        ranks.close()


def _missing(samples: Sequence[Sample], path_of: Callable[[str], Path], ranks: Ranks) -> list[Sample]:
    """Samples of this rank whose file does not exist yet."""
    owners: dict[Path, str] = {}
    for sample in samples:
        path = path_of(sample.key)
        if path in owners:
            raise DataError(
                f"{owners[path]!r} and {sample.key!r} would both be stored as {path}: the original's layout drops the "
                "folder; rename one, or extract into a store with --out"
            )
        owners[path] = sample.key
    for folder in {path.parent for path in owners}:
        folder.mkdir(parents=True, exist_ok=True)
    return [s for s in samples[ranks.rank :: ranks.world_size] if not path_of(s.key).is_file()]


def _run(
    samples: Sequence[Sample],
    settings: ExtractionSettings,
    encoder: Any | None,
    vae: Any | None,
    write: Callable[[FeatureRow], None],
    counts: dict[str, int],
    unit: str,
    ranks: Ranks,
) -> list[Rejected]:
    blocks = [Block(start, samples[start : start + _BLOCK]) for start in range(0, len(samples), _BLOCK)]
    sizes = {block.number: len(block.samples) for block in blocks}
    rejected: list[Rejected] = []

    def commit(block: EncodedBlock) -> None:
        for row in block.rows:
            row.check_finite(torch.float32)
            write(row)

    encoded = encode_blocks(blocks, settings, encoder, vae)
    with tqdm(total=len(samples), unit=unit, file=sys.stdout, mininterval=1, disable=not ranks.is_main) as bar:
        for block in write_behind(encoded, commit):
            bar.update(sizes[block.number])
            counts[unit] += len(block.rows)
            for name, number in block.counts.items():
                counts[name] += number
            rejected += block.rejected
    return rejected


def _report(
    rejected: list[Rejected],
    source: Source,
    target: OriginalTarget,
    settings: ExtractionSettings,
    max_rejected: float,
    ranks: Ranks,
) -> None:
    folder = next(path for path in (target.pictures, target.captions) if path is not None)
    suffix = "" if ranks.world_size == 1 else f".{ranks.rank}"
    if rejected:
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected)
        write_atomically(folder / f"{REJECTED}{suffix}", lines.encode("utf-8", "replace"))
    if target.pictures is not None and settings.multi_scale and ranks.is_main:
        names = [target.picture_path(sample.key, settings) for sample in source.samples]
        listed = "".join(f"{path.name}\n" for path in names if path.is_file())
        write_atomically(target.pictures / "VAE-ms.txt", listed.encode())
    refuse_too_many(rejected, source.total, max_rejected, folder)
