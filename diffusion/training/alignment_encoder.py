"""A small picture encoder that stands in for DINOv2 where no pretrained one is at hand: a ViT trained on one data set.

It learns to tell the concepts of the bundled pictures apart from disturbed views. What it knows is what the pictures
and their labels say; a real encoder has seen many millions of pictures.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.checkpoints import new_folder
from diffusion.errors import DataError
from diffusion.features.sources.folder import read_folder
from diffusion.images import resize_and_crop, to_tensor


def build_encoder(width: int, depth: int, image_size: int, patch_size: int) -> Any:
    """A ViT of transformers with random weights, without pooler."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        image_size=image_size,
        patch_size=patch_size,
        hidden_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


def read_concepts(data: Path, image_size: int, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 3, S, S) uint8, their concepts (N,) int64, and which are for training (N,) bool.

    Raises:
        DataError: pictures without `concept`.
    """
    samples = read_folder(data)
    if limit is not None:  # spread over the data: neighbours are alike
        samples = samples[:: max(1, len(samples) // limit)][:limit]
    if not all(sample.attributes.get("concept") for sample in samples):
        raise DataError(f"{data}: every row of metadata.jsonl needs a `concept`, which the encoder learns to tell")
    names = {name: index for index, name in enumerate(sorted({sample.attributes["concept"] for sample in samples}))}
    pixels = [to_tensor(resize_and_crop(sample.decode(), (image_size, image_size))[0]) for sample in samples]
    pictures = torch.stack([((picture / 2 + 0.5) * 255).round().to(torch.uint8) for picture in pixels])
    concepts = torch.tensor([names[sample.attributes["concept"]] for sample in samples])
    train = torch.tensor([sample.attributes.get("split") != "heldout" for sample in samples])
    return pictures, concepts, train


def disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, S, S) to views in [0, 1]: a crop of 60 to 100 %, mirrored or not, other brightness and contrast."""
    count, _, side, _ = pictures.shape
    device = pictures.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device, generator=generator)

    scale, mirror = uniform(0.6, 1.0), torch.sign(uniform(-1, 1) + 1e-9)
    room = 1 - scale
    matrix = torch.zeros(count, 2, 3, device=device)
    matrix[:, 0, 0], matrix[:, 1, 1] = scale * mirror, scale
    matrix[:, 0, 2], matrix[:, 1, 2] = room * uniform(-1, 1), room * uniform(-1, 1)
    grid = F.affine_grid(matrix, [count, 3, side, side], align_corners=False)
    views = F.grid_sample(pictures.float() / 255, grid, padding_mode="border", align_corners=False)
    contrast, brightness = uniform(0.7, 1.3).view(-1, 1, 1, 1), uniform(-0.15, 0.15).view(-1, 1, 1, 1)
    return ((views - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def train_alignment_encoder(
    data: Path,
    output: Path,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    width: int = 192,
    depth: int = 4,
    image_size: int = 256,
    patch_size: int = 16,
    learning_rate: float = 1e-3,
    device: str | torch.device = "cpu",
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, float]:
    """Train and write the folder that `load_picture_encoder` opens; returns the figures of its `training.json`.

    Raises:
        DataError: no pictures with concepts. CheckpointError: `output` exists.
    """
    torch.manual_seed(seed)
    pictures, concepts, is_train = read_concepts(data, image_size, limit)
    model = build_encoder(width, depth, image_size, patch_size).to(device)
    head = nn.Linear(width, int(concepts.max()) + 1).to(device)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=learning_rate, weight_decay=0.05)
    generator = torch.Generator(device=device).manual_seed(seed)
    pictures, concepts = pictures.to(device), concepts.to(device)
    rows = is_train.nonzero().flatten().to(device)

    def logits(views: Tensor) -> Tensor:
        return head(model(pixel_values=(views - mean) / std).last_hidden_state[:, 1:].mean(1))

    started, losses = time.perf_counter(), []
    on_card, warmup = torch.device(device).type == "cuda", max(1, min(100, steps // 10))
    for step in range(steps):
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        chosen = rows[torch.randint(len(rows), (batch_size,), device=device, generator=generator)]
        with torch.autocast("cuda", torch.bfloat16, enabled=on_card):
            loss = F.cross_entropy(logits(disturbed(pictures[chosen], generator)).float(), concepts[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            losses.append(loss.item())
    figures = {
        "steps": float(steps),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_accuracy": _accuracy(logits, pictures, concepts, is_train),
        "heldout_accuracy": _accuracy(logits, pictures, concepts, ~is_train),
        "seconds": round(time.perf_counter() - started, 1),
    }
    note = "a stand-in trained on the data set itself, not a general picture encoder"
    with new_folder(output) as folder:
        model.save_pretrained(str(folder))
        content = {"note": note, "data": str(data), "seed": seed, **figures}
        (folder / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figures


@torch.no_grad()
def _accuracy(logits: Any, pictures: Tensor, concepts: Tensor, chosen: Tensor) -> float:
    """Share of undisturbed pictures whose concept is told; 0 for none."""
    rows = chosen.nonzero().flatten().to(pictures.device)[:1024]
    if not len(rows):
        return 0.0
    right = [(logits(pictures[part].float() / 255).argmax(1) == concepts[part]).float() for part in rows.split(64)]
    return round(torch.cat(right).mean().item(), 4)
