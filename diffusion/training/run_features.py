"""Features that a run makes for itself, in its own folder: T5 and the VAE come once, and go before training."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion.features import ExtractionSettings, extract_folder
from diffusion.features.extract import MAX_REJECTED_SHARE
from diffusion.features.manifest import REJECTED, read_rejections
from diffusion.features.sources import Source
from diffusion.features.sources.mirror import mirrored
from diffusion.ranks import Ranks
from diffusion.training.run_log import LOGGER

_NAMED = 20  # rejected pictures in the log; their file has all


def extract_for_run(
    source: Source,
    work_dir: Path,
    pretrained: Path,
    settings: ExtractionSettings,
    ranks: Ranks,
    *,
    name: str = "features",
    limit: int | None = None,
    flips: bool = False,
    max_rejected: float = MAX_REJECTED_SHARE,
) -> dict[str, Any]:
    """Extract into `work_dir`/`name`; what is there already is kept, so a resumed run does not encode again.

    Args:
        max_rejected: see `extract_folder`; those that are rejected are named in the log.
        flips: also extract mirrored pictures, into `name`-mirrored; a picture is drawn once an epoch, either way.
    Returns:
        keys of the config's `data` section.
    """
    sources = {name: source} | ({f"{name}-mirrored": mirrored(source)} if flips else {})
    for folder, part in sources.items():
        counts = extract_folder(
            part, work_dir / folder, pretrained, settings,
            device=ranks.device.type, limit=limit, ranks=ranks, prune=True, max_rejected=max_rejected,
        )  # fmt: skip
        LOGGER.info(
            "%s: %d pictures, %d of them new, %d rejected", work_dir / folder,
            counts["pictures"], counts["new"], counts["rejected"],
        )  # fmt: skip
        for item in read_rejections(work_dir / folder / REJECTED)[:_NAMED]:
            LOGGER.warning("not used: %s", item["reason"])
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    root = str((work_dir / name).resolve())
    if not flips:
        return {"root": root}
    return {"root": root, "mix": {root: 0.5, str((work_dir / f"{name}-mirrored").resolve()): 0.5}}


def with_caption(source: Source, caption: str) -> Source:
    """The pictures of a source, all under one caption."""
    return replace(source, samples=[replace(sample, captions=(caption,), weights=()) for sample in source.samples])
