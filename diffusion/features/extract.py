"""From pictures and captions to a feature store: by one process or by many, resumable, and only what is new."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from diffusion.devices import choose_device
from diffusion.errors import ConfigError, DataError
from diffusion.features.conditions import condition_fingerprint, load_detector
from diffusion.features.fingerprint import encoder_hashes
from diffusion.features.manifest import REJECTED
from diffusion.features.rows import DTYPES
from diffusion.features.sources import Rejected, Sample, Source, open_source
from diffusion.features.stages import Block, EncodedBlock, ExtractionSettings, encode_blocks
from diffusion.features.writer import FeatureStoreWriter, RowState
from diffusion.files import FolderLock
from diffusion.images import PREPROCESSING_VERSION, compile_encoder, decode_bytes, load_vae, vae_folder
from diffusion.ranks import Ranks
from diffusion.text import CLEANER_VERSION, CaptionEncoder, text_folders

MAX_REJECTED_SHARE = 0.01
# A shard holds at most about so many captions, however many a picture has: it is encoded in memory.
_CAPTIONS_PER_SHARD = 4096
_PROBED = 32
_WRITERS = 2  # one converts while the disk syncs the other's; a block of T5-XXL captions is 250 MB


@dataclass(frozen=True)
class Encoders:
    """Folders of a tokenizer, a T5 encoder and a VAE.

    Args:
        text: pipeline or T5 folder, see `text_folders`; vae: pipeline or VAE folder, see `vae_folder`.
    """

    text: Path
    vae: Path

    @classmethod
    def find(cls, pretrained: str | Path) -> Encoders:
        """In a diffusers pipeline, or in the original's download folder (`sd-vae-ft-ema`, `t5_ckpts/t5-v1_1-xxl`)."""
        root = Path(pretrained)
        text, vae = root / "t5_ckpts" / "t5-v1_1-xxl", root / "sd-vae-ft-ema"
        return cls(text if text.is_dir() else root, vae if vae.is_dir() else root)

    def load_text(self, device: torch.device, settings: ExtractionSettings) -> CaptionEncoder:
        """Raises CheckpointError."""
        dtype = compute_dtype(device, settings)
        return CaptionEncoder.from_pretrained(
            self.text, device=device, dtype=dtype, max_length=settings.max_length, int8=settings.int8_text
        )

    def load_vae(self, device: torch.device, settings: ExtractionSettings) -> Any:
        """Raises CheckpointError."""
        vae = load_vae(self.vae, device=device, dtype=compute_dtype(device, settings))
        return compile_encoder(vae) if settings.compile_vae else vae

    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json of the T5 encoder and of the VAE. Raises DataError when one cannot be read."""
        paths = text_folders(self.text)[1] / "config.json", vae_folder(self.vae) / "config.json"
        try:
            text, vae = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        except (OSError, ValueError) as error:
            raise DataError(f"{paths[0]} or {paths[1]} cannot be read ({error})") from error
        return text, vae

    def fingerprint(self, settings: ExtractionSettings) -> dict[str, Any]:
        """Everything beside the source that determines the features. Raises CheckpointError: encoders missing."""
        return {
            **encoder_hashes(self.text, self.vae),
            "cleaner": CLEANER_VERSION,
            "preprocessing": PREPROCESSING_VERSION,
            "image_size": settings.image_size,
            "multi_scale": settings.multi_scale,
            "dtype": settings.dtype,
            "max_length": settings.max_length,
            **settings.bucket_fingerprint(),
            **condition_fingerprint(settings.condition, settings.hed_path),
            **({"int8_text": True} if settings.int8_text else {}),
        }


def compute_dtype(device: torch.device, settings: ExtractionSettings) -> torch.dtype:
    return DTYPES[settings.dtype] if device.type == "cuda" else torch.float32


def extract_folder(
    source: str | Path | Source,
    out: str | Path,
    pretrained: str | Path,
    settings: ExtractionSettings,
    *,
    device: str = "auto",
    limit: int | None = None,
    splits: Sequence[str] | None = None,
    rows_per_shard: int = 512,
    max_rejected: float = MAX_REJECTED_SHARE,
    prune: bool = False,
    dataset_root: str | Path | None = None,
    engine: Literal["local", "ray"] = "local",
    ranks: Ranks | None = None,
) -> dict[str, int]:
    """Extract features of captioned pictures; call it again after an interruption, or when pictures were added.

    Under torchrun the processes share the work; with engine "ray" a Ray cluster does, see `ray_engine`. Rows of
    pictures or captions that have changed are made anew.

    Args:
        source, splits, dataset_root: see `open_source`, or what it returned.
        out: the store's folder; pretrained: see `Encoders.find`.
        limit: evenly spaced subset of at most this many pictures.
        max_rejected: largest share of unusable pictures, see `refuse_too_many`.
        ranks: the caller's processes, which stay open; None = those of the environment.
        prune: take rows out of the store whose pictures the source no longer has; else they are an error.
    Returns:
        counts: pictures, new, changed, pruned, rejected, captions_cut, enlarged (the last two of this extraction);
            with engine "ray" the nodes that worked.
    Raises:
        DataError: broken source, another fingerprint than the store's, rows without a picture, too many rejections.
        CheckpointError: encoders missing. WorkDirLockedError: another extraction writes there.
    """
    if settings.dtype not in DTYPES:
        raise ConfigError(f"--dtype {settings.dtype} is unknown; choose one of {', '.join(DTYPES)}")
    own = ranks is None
    ranks = ranks or Ranks(device if engine == "local" else "cpu")  # a cluster's devices are not this machine's
    try:
        found = source if isinstance(source, Source) else open_source(source, splits, dataset_root=dataset_root)
        samples = found.samples
        if limit is not None and limit < len(samples):
            samples = [samples[i * len(samples) // limit] for i in range(limit)]
        refuse_too_many(found.rejected, found.total, max_rejected, Path(out))
        _probe(samples)
        job = _Job(Path(out), Encoders.find(pretrained), settings, found, samples, max_rejected, rows_per_shard)
        if engine == "local":
            return job.run(LocalEngine(job.encoders, settings, ranks, device), ranks, prune)
        if ranks.world_size > 1:
            raise ConfigError("--engine ray shares the work itself; start it with python, not with torchrun")
        from diffusion.features.ray_engine import RayEngine

        with RayEngine(job.encoders, settings, device) as cluster:
            return {**job.run(cluster, ranks, prune), "nodes": len(cluster.nodes)}
    finally:
        if own:
            ranks.close()


def _probe(samples: Sequence[Sample]) -> None:
    """Fail before the encoders are loaded when not one of a few pictures can be decoded."""
    chosen = [samples[i * len(samples) // _PROBED] for i in range(_PROBED)] if len(samples) > _PROBED else samples
    problem = None
    for sample in chosen:
        try:
            decode_bytes(sample.picture.read(), sample.picture.place)
            return
        except DataError as error:
            problem = problem or error
    raise DataError(f"none of {len(chosen)} pictures can be read, the first: {problem}")


class Engine(Protocol):
    """What encodes blocks: this process, or a cluster."""

    def null_caption(self) -> Tensor:
        """(L0, C), T5("")."""

    def run(self, blocks: Sequence[Block], writer: FeatureStoreWriter) -> Iterator[int]:
        """Encode and commit blocks, in any order; yields the number of each when `writer.entries` holds it."""


class LocalEngine:
    """Encodes in this process, on one device."""

    def __init__(self, encoders: Encoders, settings: ExtractionSettings, ranks: Ranks, device: str) -> None:
        self.encoders, self.settings = encoders, settings
        self.device = choose_device(device if ranks.world_size == 1 else str(ranks.device))

    @cached_property
    def _text(self) -> CaptionEncoder:
        return self.encoders.load_text(self.device, self.settings)

    def null_caption(self) -> Tensor:
        return self._text.encode_unpadded([""])[0]

    def run(self, blocks: Sequence[Block], writer: FeatureStoreWriter) -> Iterator[int]:
        vae = self.encoders.load_vae(self.device, self.settings)
        detector = load_detector(self.settings.condition, self.settings.hed_path, self.device)
        encoded = encode_blocks(blocks, self.settings, self._text, vae, detector)
        return (block.number for block in write_behind(encoded, writer.commit_block))


@dataclass(frozen=True)
class _Job:
    out: Path
    encoders: Encoders
    settings: ExtractionSettings
    source: Source
    samples: list[Sample]
    max_rejected: float
    rows_per_shard: int

    def run(self, engine: Engine, ranks: Ranks, prune: bool) -> dict[str, int]:
        lock, counts = None, {"changed": 0, "pruned": 0}
        fingerprint = self.encoders.fingerprint(self.settings) if ranks.is_main else None
        if ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.out, "--out")
        null_caption = engine.null_caption()
        if ranks.is_main:
            writer = self._writer(fingerprint, null_caption)
            counts = self._bring_up_to_date(writer, prune)
        ranks.barrier()
        if not ranks.is_main:
            writer = self._writer(None, null_caption)
        before, blocks = writer.num_rows, self.plan(writer)
        ranks.barrier()  # nobody writes before everybody has planned
        mine = blocks[ranks.rank :: ranks.world_size]
        if mine:
            self._encode(mine, engine, writer, ranks)
        ranks.barrier()
        writer.refresh()
        counts |= {"new": writer.num_rows - before, "captions_cut": 0, "enlarged": 0}
        counts |= writer.counts()
        if ranks.is_main:
            self._finish(writer)
        if lock is not None:
            lock.release()
        rejected = len(writer.rejected) + len(self.source.rejected)
        return {**counts, "pictures": writer.num_rows, "rejected": rejected}

    def _writer(self, fingerprint: Mapping[str, Any] | None, null_caption: Tensor) -> FeatureStoreWriter:
        return FeatureStoreWriter(self.out, fingerprint, null_caption, dtype=self.settings.dtype)

    def _bring_up_to_date(self, writer: FeatureStoreWriter, prune: bool) -> dict[str, int]:
        """Take rows out of the store that no longer are what their source says."""
        states = writer.states()
        wanted = {sample.key: sample for sample in self.samples}
        gone = sorted(states.keys() - wanted.keys())
        if gone and not prune:
            raise DataError(
                f"{self.out} holds {len(gone)} rows of pictures that this command does not select, the first "
                f"{gone[0]!r}; bring them back, take them out with --prune, or extract into another folder"
            )
        changed = [key for key in sorted(states.keys() & wanted.keys()) if has_changed(wanted[key], states[key])]
        writer.remove([*gone, *changed])
        mended = [
            key for key, item in writer.rejected.items() if key not in wanted or item.stat != wanted[key].picture.stat()
        ]
        writer.forget_rejections(mended)
        return {"changed": len(changed), "pruned": len(gone)}

    def plan(self, writer: FeatureStoreWriter) -> list[Block]:
        """What is not in the store, cut into blocks; after an interruption the same blocks as before."""
        states = writer.states()
        todo = [s for s in self.samples if s.key not in states and s.key not in writer.rejected]
        captions = max(1, sum(len(sample.captions) for sample in self.samples) // len(self.samples))
        size = max(1, min(self.rows_per_shard, _CAPTIONS_PER_SHARD // captions))
        parts = [todo[start : start + size] for start in range(0, len(todo), size)]
        return [Block(number, part) for number, part in zip(writer.free_numbers(), parts)]

    def _encode(self, blocks: list[Block], engine: Engine, writer: FeatureStoreWriter, ranks: Ranks) -> None:
        sizes = {block.number: len(block.samples) for block in blocks}
        silent = not ranks.is_main
        with tqdm(total=sum(sizes.values()), unit="picture", file=sys.stdout, mininterval=1, disable=silent) as bar:
            for number in engine.run(blocks, writer):
                bar.update(sizes[number])
                rejected = [*self.source.rejected, *writer.rejected.values()]
                entries = list(writer.entries.values())  # at once: a thread adds to them
                rejected += [item for entry in entries for item in map(_as_rejected, entry.rejected)]
                self._refuse_too_many(rejected, writer, ranks.is_main)

    def _finish(self, writer: FeatureStoreWriter) -> None:
        self._refuse_too_many([*self.source.rejected, *writer.rejected.values()], writer, True)
        writer.close(self.source.rejected)
        if writer.num_rows == 0:
            raise DataError(f"{self.out}: not one picture could be extracted; see {self.out / REJECTED}")

    def _refuse_too_many(self, rejected: Iterable[Rejected], writer: FeatureStoreWriter, lists_them: bool) -> None:
        distinct = list({item.key: item for item in rejected}.values())
        try:
            refuse_too_many(distinct, self.source.total, self.max_rejected, self.out)
        except DataError:
            if lists_them:
                writer.list_rejections(distinct)
            raise


def has_changed(sample: Sample, state: RowState) -> bool:
    """Whether captions, attributes or the bytes of the picture are others than when the row was made."""
    if not state.record_hash:  # a row of format version 1, which kept neither
        return False
    if state.record_hash != sample.record_hash():
        return True
    if state.source_stat == sample.picture.stat():
        return False
    try:
        return xxhash.xxh3_128_hexdigest(sample.picture.read()) != state.source_hash
    except DataError:
        return True


def write_behind(encoded: Iterable[EncodedBlock], commit: Callable[[EncodedBlock], None]) -> Iterator[EncodedBlock]:
    """Commit blocks in threads while the next one is encoded; yields each, in order, when it is safely on disk."""
    with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
        waiting: deque[tuple[EncodedBlock, Future[None]]] = deque()

        def first() -> EncodedBlock:
            block, future = waiting.popleft()
            future.result()
            return block

        for block in encoded:
            if len(waiting) == _WRITERS:
                yield first()
            waiting.append((block, pool.submit(commit, block)))
        while waiting:
            yield first()


def refuse_too_many(rejected: Sequence[Rejected], total: int, share: float, out: Path) -> None:
    """One unusable picture is always allowed; beyond that at most a share of all. A share of 0 allows none.

    Raises:
        DataError: more; with the number, the last reason, and how to go on.
    """
    if not 0 <= share <= 1:
        raise DataError(f"max_rejected={share} must lie in 0..1")
    allowed = max(1, int(total * share)) if share > 0 else 0
    if len(rejected) <= allowed:
        return
    if share == 0:
        raise DataError(
            f"{len(rejected)} of {total} pictures cannot be used: {rejected[-1].reason}; mend or remove such pictures"
        )
    raise DataError(
        f"{len(rejected)} of {total} pictures cannot be used, {allowed} are allowed; the last: {rejected[-1].reason}. "
        f"`python tools/check_data.py` lists all; mend them, or go on without them with --max-rejected "
        f"{min(1.0, len(rejected) / total + 0.01):.2f} ({out / REJECTED} lists them)"
    )


def _as_rejected(item: Mapping[str, str]) -> Rejected:
    return Rejected(**item)
