"""How the original extracts features, for comparison: one caption or picture a call, one file a row."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import timed

ORIGINAL_THREADS = 20


def original_captions(
    encoder: Any, texts: Sequence[str], folder: Path, device: Any, tokens: int
) -> tuple[float, float]:
    """Captions a second: one after the other, and by 20 threads that share one lock around the encoder.

    Each is padded to `tokens`.
    """
    folder.mkdir()
    lock = threading.Lock()

    @torch.no_grad()
    def extract(job: tuple[int, str]) -> None:
        with lock:
            batch = encoder.tokenizer(
                job[1], max_length=tokens, padding="max_length", truncation=True, return_tensors="pt"
            ).to(device)
            embeds = encoder.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            feature, mask = embeds.float().cpu().numpy(), batch["attention_mask"].cpu().numpy()
        np.savez_compressed(folder / f"{job[0]}.npz", caption_feature=feature, attention_mask=mask)

    jobs = list(enumerate(texts))
    for job in jobs[:4]:
        extract(job)
    one_by_one = timed(device, lambda: list(map(extract, jobs)))
    with ThreadPoolExecutor(ORIGINAL_THREADS) as pool:
        threaded = timed(device, lambda: list(pool.map(extract, jobs)))
    return len(jobs) / one_by_one, len(jobs) / threaded


def original_pictures(vae: Any, paths: Sequence[Path], folder: Path, px: int, device: Any) -> float:
    """Pictures a second of one loop: decode, resize, crop, one call of the float32 VAE, one npy."""
    from torchvision import transforms as T

    folder.mkdir()
    transform = T.Compose([T.Resize(px), T.CenterCrop(px), T.ToTensor(), T.Normalize([0.5], [0.5])])

    @torch.no_grad()
    def extract(path: Path) -> None:
        pixels = transform(Image.open(path).convert("RGB"))[None].to(device)
        posterior = vae.encode(pixels).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy().squeeze()
        np.save(folder / f"{path.stem}.npy", moments)

    for path in paths[:3]:
        extract(path)
    return len(paths) / timed(device, lambda: list(map(extract, paths)))
