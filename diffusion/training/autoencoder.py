"""Train the small KL autoencoder (f8, 4 channels) of the bundled model.

Legend: B batch, H = W picture side in pixels. Pictures live on the device as uint8; the loss is L1 on pixels and on
their gradients at three scales (edges) and the squared error of colours, with a small KL term; the optimiser is Muon.
When training ends, the latents are centred and equalised by folding a per-channel shift and scale into the 1x1
convolutions around the latent, which changes no picture; `scaling_factor` is then 1 / std.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.errors import ConfigError, DataError, NumericalError
from diffusion.evaluation.picture_features import fine_detail_energy
from diffusion.images import load_vae
from diffusion.training.autoencoder_losses import colour_loss, detail_loss, edge_loss, kl_loss


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the network and of its training.

    `kl_weight`: factor of the KL divergence, a mean over latent elements. `edge_weight`, `colour_weight`,
    `detail_weight`: factors of the losses of those names (see `autoencoder_losses`).
    `latent_noise`: the decoder sees latents disturbed by up to this many standard deviations.
    `crop`: side in pixels of the training crops; the network is convolutional, so small crops cost less per update.
    `steps` or `seconds` ends training; the learning rate follows the share that is done.
    """

    channels: tuple[int, ...] = (32, 64, 128, 192)
    layers_per_block: int = 1
    norm_groups: int = 16
    crop: int = 256
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    kl_weight: float = 1e-5
    edge_weight: float = 1.0
    colour_weight: float = 4.0
    detail_weight: float = 0.0
    latent_noise: float = 0.0
    ema_rate: float = 0.998
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        bad = [width for width in self.channels if width % self.norm_groups]
        if bad:
            raise ConfigError(f"channels {bad} are not divisible by norm_groups={self.norm_groups}")
        if self.crop % 2 ** (len(self.channels) - 1):
            raise ConfigError(f"crop={self.crop} is not divisible by {2 ** (len(self.channels) - 1)}")
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError("give either steps or seconds, so that the learning rate knows its end")


def build_autoencoder(config: AutoencoderConfig, sample_size: int) -> Any:
    """A new diffusers AutoencoderKL: 3 channels, 4 latent channels, no attention (fast on a CPU)."""
    from diffusers import AutoencoderKL

    depth = len(config.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=4,
        norm_num_groups=config.norm_groups,
        sample_size=sample_size,
        mid_block_add_attention=False,
    )


def load_pictures(data: Path, split: str, *, limit: int | None = None) -> Tensor:
    """Pictures of one split of an ImageFolder with metadata.jsonl: (N, 3, H, W) uint8, all of one size.

    Raises DataError when the metadata is unreadable, the split is empty, or sizes differ.
    """
    import numpy as np

    from diffusion.images import decode_image

    names = [name for name, _ in _listed(data, split)[:limit]]
    if not names:
        raise DataError(f"{data}: split {split!r} has no pictures")
    arrays = [np.asarray(decode_image(data / name)) for name in names]
    odd = [name for name, array in zip(names, arrays) if array.shape != arrays[0].shape]
    if odd:
        raise DataError(f"{data / odd[0]}: its size differs from {names[0]}; all pictures must have one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _listed(data: Path, split: str) -> list[tuple[str, str]]:
    """File name and concept of a split's pictures; one without a concept is one of its own."""
    try:
        with (data / "metadata.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [(row["file_name"], row.get("concept") or row["file_name"]) for row in rows if row["split"] == split]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{data / 'metadata.jsonl'}: no readable list of pictures ({error})") from error


def concept_weights(data: Path, split: str, *, limit: int | None = None) -> Tensor:
    """(N,) weights by which every `concept` of the metadata is drawn equally often; a picture without one is one.

    Most emojis are people in five tones of skin: drawn uniformly, the VAE would see little else, and lose the colours
    of what is rare.
    """
    concepts = [concept for _, concept in _listed(data, split)[:limit]]
    counts = Counter(concepts)
    return torch.tensor([1 / counts[concept] for concept in concepts])


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1


def augment(pixels: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Light variation that keeps edges sharp: (B, 3, H, W) in [-1, 1] -> (B, 3, crop, crop).

    Per batch: one zoom out of four (none half of the time). Per picture: mirror, shift (white comes in at the border),
    and for three in ten a permutation of the colour channels. `generator` is on the pictures' device.
    """
    count, _, side, _ = pixels.shape
    device = pixels.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # One grid sample does zoom, mirror and shift; unzoomed shifts are whole pixels, so nothing is blurred.
    zooms = torch.tensor([1.0, 1.0, 1.0, 1.15, 0.85, 0.7], device=device)
    scale = zooms[(draw(1) * len(zooms)).long()]  # > 1 shows more than the picture
    slack = ((side - crop * scale) / 2).clamp(min=16)
    shift = ((draw(count, 2) * 2 - 1) * slack).round()  # pixels, (B, 2)
    mirror = (draw(count) < 0.5).float() * -2 + 1
    ticks = torch.arange(crop, device=device) - (crop - 1) / 2
    x = (ticks * scale * mirror[:, None] + shift[:, :1]) / (side / 2)  # (B, crop)
    y = (ticks * scale + shift[:, 1:]) / (side / 2)
    grid = torch.stack([x[:, None, :].expand(-1, crop, -1), y[:, :, None].expand(-1, -1, crop)], dim=-1)
    moved = F.grid_sample(pixels - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1  # white = 1
    order = draw(count, 3).argsort(1)
    plain = torch.arange(3, device=device).expand(count, 3)
    order = torch.where(draw(count, 1) < 0.3, order, plain)
    return moved.gather(1, order[:, :, None, None].expand(-1, -1, crop, crop))


class AutoencoderObjective(nn.Module):
    """pixels (B, 3, H, W), noise (B, 4, H/8, W/8) -> reconstruction and moments, all float32.

    disturbance: (B, 1, 1, 1), std of the noise beyond the posterior's, in units of the latents' std.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor, disturbance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + noise * (log_variance.exp() + (disturbance * mean.detach().std()).square()).sqrt()
        return self.vae.decode(latents).sample.float(), mean, log_variance


def progress_share(step: int, elapsed_s: float, config: AutoencoderConfig) -> float:
    """How much of the training is done, 0 to 1."""
    if config.steps is not None:
        return min(1.0, step / config.steps)
    assert config.seconds is not None
    return min(1.0, elapsed_s / config.seconds)


def learning_rate_factor(step: int, share: float, warmup_steps: int) -> float:
    """Linear warm-up by steps, times a cosine to zero by share."""
    return min(1.0, (step + 1) / max(1, warmup_steps)) * 0.5 * (1 + math.cos(math.pi * share))


def loss_parts(found: Tensor, pixels: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
    """Each term by its name, before its weight."""
    return {
        "pixel": (found - pixels).abs().mean(),
        "edge": edge_loss(found, pixels),
        "colour": colour_loss(found, pixels),
        "detail": detail_loss(found, pixels),
        "kl": kl_loss(mean, log_variance),
    }


def weighted(parts: dict[str, Tensor], config: AutoencoderConfig) -> Tensor:
    """The loss: `pixel` counts once, all others by `config.NAME_weight`."""
    others = (getattr(config, f"{name}_weight") * part for name, part in parts.items() if name != "pixel")
    return sum(others, parts["pixel"])


@torch.no_grad()
def latent_statistics(vae: Any, pictures: Tensor, *, device: str, batch_size: int = 32) -> tuple[Tensor, Tensor, float]:
    """Per-channel mean (C,) and std (C,) of sampled latents, and the mean posterior std (how noisy they are).

    The variance of a sample is that of the posterior means plus the mean posterior variance (law of total variance).
    """
    sums = torch.zeros(4, vae.config.latent_channels, dtype=torch.float64, device=device)
    for part in pictures.split(batch_size):
        posterior = vae.encode(to_signed(part.to(device)).to(vae.dtype)).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        for row, value in enumerate((mean, mean.square(), variance, variance.sqrt())):
            sums[row] += value.mean(dim=(0, 2, 3)) * len(part)
    mean, square, variance, noise = sums / len(pictures)
    return mean, (square - mean.square() + variance).sqrt(), float(noise.mean())


@torch.no_grad()
def equalize_latents(vae: Any, mean: Tensor, std: Tensor) -> float:
    """Centre the latents and give every channel the same std, without changing any reconstruction.

    The affine map is folded into `quant_conv` (and its inverse into `post_quant_conv`), both 1x1. Sets and returns
    `scaling_factor` = 1 / common std.
    """
    channels = vae.config.latent_channels
    common = std.log().mean().exp()
    gain = (common / std).to(vae.quant_conv.weight)  # (C,), new = gain * (old - mean)
    shift = mean.to(vae.quant_conv.weight)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= gain[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) * gain
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[channels:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=1 / float(common))
    return float(vae.config.scaling_factor)


@torch.no_grad()
def reconstruction_quality(vae: Any, pictures: Tensor, *, device: str, batch_size: int = 32) -> tuple[float, float]:
    """Encode (posterior mean) and decode pictures (N, 3, H, W) uint8.

    Returns:
        mean over pictures of the peak signal-to-noise ratio in dB, and the median of their fine detail over the
        pictures' own (`fine_detail_energy`): below 1 is blurred.
    """
    psnr, detail = [], []
    for part in pictures.split(batch_size):
        pixels = to_signed(part.to(device))
        found = vae.decode(vae.encode(pixels.to(vae.dtype)).latent_dist.mean).sample.float().clamp(-1, 1)
        error = ((found - pixels) / 2).square().flatten(1).mean(1)  # peak-to-peak 1
        psnr.append(-10 * error.clamp(min=1e-10).log10())
        detail.append(fine_detail_energy(found) / fine_detail_energy(pixels).clamp(min=1e-10))
    return float(torch.cat(psnr).mean()), float(torch.cat(detail).median())


def _fit(
    vae: Any,
    pictures: Tensor,
    weights: Tensor,
    config: AutoencoderConfig,
    *,
    device: str,
    seed: int,
    compile_model: bool,
    log: Callable[[dict[str, float]], None],
    log_every: int,
) -> int:
    """The training loop; leaves the averaged weights in `vae` and returns the number of steps."""
    from diffusion.training.muon import muon
    from diffusion.training.optimization import WeightAverage, parameter_groups

    objective: Any = AutoencoderObjective(vae)
    average = WeightAverage(vae, config.ema_rate)
    if compile_model:
        objective = torch.compile(objective)
    cuda = torch.device(device).type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(seed)
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    groups = parameter_groups(vae, weight_decay=1e-4)
    optimizer = muon(vae, groups, config.learning_rate, "_block", betas=(0.9, 0.99), eps=1e-8)
    side = config.crop // 2 ** (len(config.channels) - 1)
    started, step = time.monotonic(), 0
    # Compilation is inside the time limit: the limit is what the caller pays for.
    while (share := progress_share(step, time.monotonic() - started, config)) < 1:
        chosen = torch.multinomial(weights, config.batch_size, replacement=True, generator=generator)
        pixels = augment(to_signed(pictures[chosen]), config.crop, generator).contiguous(memory_format=layout)
        noise = torch.randn(len(pixels), 4, side, side, generator=generator, device=device)
        disturbance = config.latent_noise * torch.rand(len(pixels), 1, 1, 1, generator=generator, device=device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, share, config.warmup_steps)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=cuda):
            found, mean, log_variance = objective(pixels, noise, disturbance)
        parts = loss_parts(found, pixels, mean, log_variance)
        loss = weighted(parts, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        average.update(vae)
        if step % log_every == 0:
            entry = {"step": step, "loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            if not math.isfinite(entry["loss"]):
                raise NumericalError(f"autoencoder loss is {entry['loss']} at step {step}; use a lower learning rate")
            log({**entry, "seconds": time.monotonic() - started})
        step += 1
        if cuda and config.seconds is not None and step % 8 == 0:
            torch.cuda.synchronize()  # the host runs ahead of the device: without this the time limit would be late
    vae.load_state_dict(average.tensors, strict=False)  # what is frozen is as it was
    return step


def train_autoencoder(
    data: Path,
    output: Path,
    config: AutoencoderConfig,
    *,
    device: str = "cpu",
    seed: int = 0,
    compile_model: bool = False,
    limit: int | None = None,
    log_every: int = 50,
    start: Path | None = None,
    decoder_only: bool = False,
) -> dict[str, Any]:
    """Train on the train split alone, write `output` (fp16 AutoencoderKL folder) and `output/../vae_metrics.json`.

    Concepts are drawn equally often, see `concept_weights`. Held-out and reserved pictures are never seen, so the
    held-out PSNR is honest. Figures are those of the stored fp16 weights, run in float32. With `config.steps` and a CPU
    the result depends on the seed alone.

    Args:
        start: folder of a VAE to go on from; its shape counts, not the config's.
        decoder_only: leave the encoder and its latents as they are, so that models trained on them stay valid.
    Returns:
        the metrics.
    Raises:
        ConfigError: decoder_only without a start. DataError: pictures that are too small or not square.
    """
    if decoder_only and start is None:
        raise ConfigError("decoder_only needs a start: the VAE whose latents stay")
    train = load_pictures(data, "train", limit=limit).to(device)
    heldout = load_pictures(data, "heldout", limit=limit)
    if train.shape[2] != train.shape[3] or train.shape[2] < config.crop:
        raise DataError(f"{data}: pictures of {tuple(train.shape[2:])} px; square ones of {config.crop} px are needed")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    vae = build_autoencoder(config, train.shape[2]) if start is None else load_vae(start).requires_grad_(True)
    vae = vae.to(device)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    if torch.device(device).type == "cuda":
        vae = vae.to(memory_format=torch.channels_last)
    history: list[dict[str, float]] = []

    def log(entry: dict[str, float]) -> None:
        history.append({key: round(value, 5) for key, value in entry.items()})
        print(" ".join(f"{key}={value:g}" for key, value in history[-1].items()), flush=True)

    vae.train()
    started = time.monotonic()
    weights = concept_weights(data, "train", limit=limit).to(device)
    steps = _fit(
        vae, train, weights, config, device=device, seed=seed, compile_model=compile_model, log=log, log_every=log_every
    )
    seconds = round(time.monotonic() - started, 1)
    vae.eval()
    mean, std, noise = latent_statistics(vae, train, device=device)
    factor = vae.config.scaling_factor if decoder_only else equalize_latents(vae, mean, std)
    vae.half().save_pretrained(str(output))
    vae.float()
    mean_after, std_after, _ = latent_statistics(vae, train, device=device)
    psnr_heldout, sharpness_heldout = reconstruction_quality(vae, heldout, device=device)
    metrics: dict[str, Any] = {
        "psnr_heldout": psnr_heldout,
        "sharpness_heldout": sharpness_heldout,
        "psnr_train": reconstruction_quality(vae, train[: len(heldout)], device=device)[0],
        "pictures": {"train": len(train), "heldout": len(heldout)},
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "scaling_factor": factor,
        "latent_mean": mean_after.tolist(),
        "latent_std": std_after.tolist(),
        "latent_std_before": std.tolist(),
        "posterior_std_over_latent_std": noise / float(std.mean()),
        "steps": steps,
        "seconds": seconds,
        "history": history,
    }
    (output.parent / "vae_metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics
