"""Captions by an image-text model: resumable, by one process or by many; bad pictures are listed and passed over."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from diffusion.devices import choose_device, choose_dtype
from diffusion.errors import DataError
from diffusion.features.captioner import Captioner
from diffusion.features.captioning_index import CaptionTask, read_caption_index
from diffusion.features.extract import refuse_too_many
from diffusion.features.manifest import REJECTED, differences
from diffusion.features.sources import Rejected
from diffusion.features.stages import ahead
from diffusion.files import FolderLock, write_atomically
from diffusion.images import decode_bytes, picture_size
from diffusion.ranks import Ranks

CAPTIONS = "captions.json"
SETTINGS = "captioning.json"
# Processors scale the shorter side to a fixed length, so a line of 1 x 20000 px would become gigabytes.
_MAX_RATIO = 16
_MAX_SIDE_PX = 2048
# The first is the prompt of the paper (2310.00426, section 2.4); the second refines the caption that a picture has.
_DESCRIBE = "Describe this image and its style in a very detailed manner."
_REFINE = "The caption of this image is: {caption}\nKeep what it says, and describe the image and its style in a very "
_INSTRUCTIONS = {"describe": _DESCRIBE, "refine": _REFINE + "detailed manner."}


@dataclass(frozen=True)
class CaptioningSettings:
    """How captions are made; captions of other settings are not mixed in one folder.

    Args:
        model: folder or hub id of an image-text model of transformers.
        prompt: "describe", "refine" (the caption that the picture has), or "auto" (refine where there is one).
        instruction: own instruction instead, with {caption} for the caption that the picture has.
        template: see `Captioner`, as are temperature, seed and max_new_tokens.
    """

    model: str
    prompt: str = "auto"
    instruction: str | None = None
    template: str | None = None
    temperature: float = 0.2
    seed: int = 0
    max_new_tokens: int = 512

    def instruction_for(self, task: CaptionTask) -> str:
        """What the model is told of a picture. Raises DataError: a caption is needed and the picture has none."""
        text = self.instruction
        if text is None:
            text = _INSTRUCTIONS[("refine" if task.original else "describe") if self.prompt == "auto" else self.prompt]
        if "{caption}" in text and not task.original:
            raise DataError(f"{task.picture.place} has no caption to refine; use --prompt auto or describe")
        return text.replace("{caption}", task.original)


def caption_pictures(
    data_root: Path,
    index: Path | None,
    output: Path,
    settings: CaptioningSettings,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    max_rejected: float = 0.01,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, int]:
    """Write OUTPUT/NAME.txt for every picture that has none, then OUTPUT/captions.json over all.

    Under torchrun the processes share the work.

    Args:
        data_root, index: see `read_caption_index`; limit: first so many pictures.
        max_rejected: largest share of unusable pictures, see `refuse_too_many`.
    Returns:
        counts: captions, new, cut (at `max_new_tokens`), rejected.
    Raises:
        DataError: nothing to caption, captions made otherwise, too many unusable pictures. WorkDirLockedError: another
            program writes there. CheckpointError, ConfigError: see `Captioner`.
    """
    ranks, lock = Ranks(device), None
    try:
        chosen = choose_device(device if ranks.world_size == 1 else str(ranks.device))
        sidecars = output.resolve() != data_root.resolve()
        tasks, rejected = read_caption_index(data_root, index, sidecars=sidecars)
        tasks = tasks[:limit]
        if ranks.is_main:
            output.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(output, "--output")
            _claim(output, settings, tasks)
        ranks.barrier()
        todo = [task for task in tasks if not (output / task.text_name).is_file()]
        ranks.barrier()  # nobody writes before everybody has planned
        job = _Job(output, settings, len(tasks) + len(rejected), max_rejected, batch_size)
        mine = todo[ranks.rank :: ranks.world_size]
        if mine:
            options = {name: getattr(settings, name) for name in ("template", "temperature", "seed", "max_new_tokens")}
            captioner = Captioner.from_pretrained(
                settings.model, device=chosen, dtype=choose_dtype(dtype, chosen), **options
            )
            job.run(captioner, mine, ranks.is_main)
        parts = ranks.gather((job.new, job.cut, job.rejected))
        rejected += [item for part in parts for item in part[2]]
        counts = {"new": sum(part[0] for part in parts), "cut": sum(part[1] for part in parts)}
        if ranks.is_main:
            counts["captions"] = _finish(output, tasks, rejected)
        refuse_too_many(rejected, job.total, max_rejected, output)
        return {**counts, "rejected": len(rejected)}
    finally:
        if lock is not None:
            lock.release()
        ranks.close()


class _Job:
    def __init__(
        self, output: Path, settings: CaptioningSettings, total: int, max_rejected: float, batch_size: int
    ) -> None:
        self.output, self.settings, self.total = output, settings, total
        self.max_rejected, self.batch_size = max_rejected, batch_size
        self.new, self.cut = 0, 0
        self.rejected: list[Rejected] = []

    def run(self, captioner: Captioner, tasks: Sequence[CaptionTask], is_main: bool) -> None:
        """Caption this process's pictures, while threads decode the next ones."""
        with (
            ThreadPoolExecutor(max_workers=8) as pool,
            tqdm(total=len(tasks), unit="picture", file=sys.stdout, mininterval=1, disable=not is_main) as bar,
        ):
            for batch in self._batches(ahead(pool, tasks, self._prepare, 2 * self.batch_size)):
                images, instructions = [image for _, image, _ in batch], [text for _, _, text in batch]
                captions = captioner(images, instructions, [task.key for task, _, _ in batch])
                for (task, _, _), (caption, ended) in zip(batch, captions):
                    self._write(task, caption, ended)
                bar.update(len(batch))
                refuse_too_many(self.rejected, self.total, self.max_rejected, self.output)

    def _prepare(self, task: CaptionTask) -> tuple[CaptionTask, Image.Image, str] | Rejected:
        try:
            instruction = self.settings.instruction_for(task)
            return task, _decode(task), instruction
        except (DataError, MemoryError) as error:
            return Rejected(task.key, str(error) or f"{task.picture.place}: out of memory", task.picture.stat())

    def _batches(
        self, prepared: Iterator[tuple[CaptionTask, Image.Image, str] | Rejected]
    ) -> Iterator[list[tuple[CaptionTask, Image.Image, str]]]:
        batch: list[tuple[CaptionTask, Image.Image, str]] = []
        for item in prepared:
            if isinstance(item, Rejected):
                self.rejected.append(item)
            else:
                batch.append(item)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _write(self, task: CaptionTask, caption: str, ended: bool) -> None:
        if not caption:
            self.rejected.append(Rejected(task.key, f"{task.picture.place}: the model said nothing"))
            return
        path = self.output / task.text_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (caption + "\n").encode("utf-8", "replace"))
        self.new += 1
        self.cut += not ended


def _decode(task: CaptionTask) -> Image.Image:
    place = task.picture.place
    image = decode_bytes(task.picture.read(), place)
    if max(image.size) > _MAX_RATIO * min(image.size):
        raise DataError(f"{place}: {image.width}x{image.height} px is beyond {_MAX_RATIO} to 1; crop it")
    image.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.BICUBIC)  # dozens wait in memory
    return image


def _claim(output: Path, settings: CaptioningSettings, tasks: Sequence[CaptionTask]) -> None:
    """Refuse a folder whose captions were made otherwise, or not by this program."""
    path, wanted = output / SETTINGS, asdict(settings)
    written = [task.text_name for task in tasks if (output / task.text_name).exists()]
    if path.is_file():
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); choose another --output") from error
        differing = differences(stored, wanted)
        if not differing:
            return
        if written:
            raise DataError(f"{output} holds captions made otherwise: {', '.join(differing)}; choose another --output")
    elif written:
        raise DataError(
            f"{output} already holds {len(written)} texts that this program did not write, the first {written[0]!r}; "
            "choose another --output"
        )
    write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())


def _finish(output: Path, tasks: Sequence[CaptionTask], rejected: Sequence[Rejected]) -> int:
    """Write captions.json, in the form of the original's index, and rejected.jsonl; returns the number of captions."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        items = [item for item in pool.map(lambda task: _item(output, task), tasks) if item is not None]
    write_atomically(output / CAPTIONS, (json.dumps(items, indent=1) + "\n").encode())
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected)
    if lines or (output / REJECTED).exists():
        write_atomically(output / REJECTED, lines.encode("utf-8", "replace"))
    return len(items)


def _item(output: Path, task: CaptionTask) -> dict[str, Any] | None:
    path = output / task.text_name
    if not path.is_file():
        return None
    height, width = task.size or picture_size(task.picture.read(), task.picture.place)
    caption = path.read_text(encoding="utf-8").strip()
    item = {"path": task.key, "height": height, "width": width, "ratio": round(height / width, 4), "prompt": caption}
    return {**item, "original_prompt": task.original} if task.original else item
