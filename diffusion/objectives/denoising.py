"""What one step of base training minimises: predict the noise (or velocity, or flow), and the variance by its bound.

L_simple: DDPM Eq. 14 (arXiv:2006.11239).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion.models import pad_captions
from diffusion.objectives.captions import drop_captions
from diffusion.objectives.levers import Alignment, Routing, is_on, silent, watch_blocks
from diffusion.objectives.targets import prediction_mse, variance_bound
from diffusion.process import (
    GaussianProcess,
    LogitNormal,
    StraightPath,
    keyed_normal,
    keyed_sigmas,
    keyed_timesteps,
    keyed_uniform,
)


class LatentBatch(Protocol):
    """Features of B samples, as `diffusion.data.TrainBatch` carries them."""

    latents_mean: Tensor  # (B, C, h, w), unscaled posterior mean
    latents_std: Tensor  # (B, C, h, w)
    caption_embeds: Tensor  # (B, L, caption_channels)
    caption_mask: Tensor  # (B, L) bool, True = keep
    img_hw: Tensor  # (B, 2) pixels
    aspect_ratio: Tensor  # (B,)
    sample_numbers: Tensor  # (B,) int64, global


@dataclass
class LossOutput:
    """Mean loss of a micro-batch, and detached (B,) values for the log."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One training family: what a step minimises. Every random draw is keyed by the batch's sample numbers."""

    def loss(self, model: nn.Module, batch: LatentBatch, seed: int) -> LossOutput: ...

    def for_validation(self) -> Objective:
        """The objective as the validation loss takes it."""

    def choices(self, batch: LatentBatch) -> Hashable | None:
        """What the host decides about the loss of a batch: batches of equal choices and shapes are the same work on
        other numbers, which a CUDA graph can repeat. None = they are not."""


def sample_posterior(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """Draw from the VAE's posterior; noise None = its mode. All (B, C, h, w), unscaled."""
    return mean if noise is None else mean + std * noise


@dataclass
class DenoisingObjective:
    """Denoising, with learned-range variance where the network predicts one, on precomputed features.

    Args:
        process: the full noise process; flow has a path of its own.
        scale_factor: latents are multiplied by it (0.18215 for SD's VAE).
        class_dropout_prob: probability that a caption is replaced by the null caption.
        null_embeds: (L0, C) T5("") for the "t5_empty" convention; None = the model's stored null embedding.
        sample_latents: draw from the VAE posterior (True) or take its mode.
        min_snr_gamma: see `prediction_mse`.
        learn_variance: train predicted variances by the bound; False leaves them as they are.
        logit_normal: density of the timesteps; None = uniform.
        noise_offset: size of noise that is constant over a channel, added to the usual.
        prediction_type: of the network, "epsilon", "v_prediction" or "flow"; flow_shift: of flow, see `shift_sigma`.
        routing, alignment: levers of training; None = off.
        caption_length: pad captions to so many tokens, so that compiled blocks see one shape; None = to the longest.
    """

    process: GaussianProcess
    scale_factor: float
    class_dropout_prob: float = 0.1
    null_embeds: Tensor | None = None
    sample_latents: bool = True
    min_snr_gamma: float | None = None
    learn_variance: bool = True
    logit_normal: LogitNormal | None = None
    noise_offset: float = 0.0
    prediction_type: str = "epsilon"
    flow_shift: float = 1.0
    routing: Routing | None = None
    alignment: Alignment | None = None
    caption_length: int | None = None

    def loss(self, model: nn.Module, batch: LatentBatch, seed: int) -> LossOutput:
        """One forward pass on a micro-batch; the same sample numbers give the same loss on any layout of ranks."""
        numbers = batch.sample_numbers
        shape = batch.latents_mean.shape[1:]
        latents = self.sample(batch.latents_mean, batch.latents_std, numbers, seed, "posterior")
        timesteps = self.draw_timesteps(seed, numbers)
        noise = keyed_normal(seed, "noise", numbers, shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * keyed_normal(seed, "noise_offset", numbers, (shape[0], 1, 1))
        drop = keyed_uniform(seed, "caption_drop", numbers) < self.class_dropout_prob
        watch = watch_blocks(unwrap(model), batch, seed, self.routing, self.alignment)
        denoise = self.denoiser(model, batch, drop, watch, **self.further_inputs(batch, seed))
        output = self.terms(denoise, latents, timesteps, noise)
        if self.alignment is None:
            return output
        if watch is None or watch.similarity is None:
            return LossOutput(output.loss + silent(unwrap(model)), output.metrics)
        distance = 1 - watch.similarity
        metrics = {**output.metrics, "alignment": distance.detach()}
        return LossOutput(output.loss + self.alignment.weight * distance.mean(), metrics)

    @property
    def path(self) -> GaussianProcess | StraightPath:
        """How a picture becomes noise for a network of this kind."""
        return StraightPath() if self.prediction_type == "flow" else self.process

    def draw_timesteps(self, seed: int, numbers: Tensor) -> Tensor:
        """(B,) timesteps of samples, as `path` takes them."""
        if self.prediction_type == "flow":
            return keyed_sigmas(seed, numbers, self.logit_normal, self.flow_shift)
        return keyed_timesteps(seed, numbers, self.process.num_timesteps, self.logit_normal)

    def denoiser(
        self,
        model: nn.Module,
        batch: LatentBatch,
        drop: Tensor,
        before_block: Callable[..., Tensor] | None = None,
        **inputs: Any,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with the captions of a batch, null where drop (B,) is True: (x_t, timesteps) -> output."""
        embeds, mask = self.drop_captions(model, batch, drop)
        return lambda x_t, t: predict(model, x_t, t, embeds, mask, batch, before_block, **inputs)

    def sample(self, mean: Tensor, std: Tensor, numbers: Tensor, seed: int, purpose: str) -> Tensor:
        """Scaled latents from the VAE's posterior, drawn or its mode: (B, C, h, w)."""
        noise = keyed_normal(seed, purpose, numbers, mean.shape[1:]) if self.sample_latents else None
        return sample_posterior(mean, std, noise) * self.scale_factor

    def further_inputs(self, batch: LatentBatch, seed: int) -> dict[str, Tensor]:
        """Keyword arguments of the network beside captions and sizes; a family that has some overrides this."""
        return {}

    def for_validation(self) -> DenoisingObjective:
        """The same loss without caption dropout and with uniform timesteps, so that runs can be compared."""
        off: dict[str, Any] = {"logit_normal": None, "noise_offset": 0.0, "routing": None, "alignment": None}
        return replace(self, class_dropout_prob=0.0, **off)

    def choices(self, batch: LatentBatch) -> Hashable | None:
        """Levers end at a sample number."""
        return is_on(self.routing, batch), is_on(self.alignment, batch)

    def terms(
        self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, timesteps: Tensor, noise: Tensor
    ) -> LossOutput:
        """Loss of given draws; denoise(x_t, original timesteps) -> (B, C or 2C, h, w)."""
        path, kind, channels = self.path, self.prediction_type, latents.shape[1]
        noisy = path.q_sample(latents, timesteps, noise)
        output = denoise(noisy, path.original_timesteps(timesteps))
        target = path.target(latents, timesteps, noise, kind)
        snr = None if self.min_snr_gamma is None else self.process.snr(timesteps)
        mse = prediction_mse(output[:, :channels], target, snr, self.min_snr_gamma, kind)
        metrics = {"mse": mse.detach()}
        loss = mse
        if self.learn_variance and output.shape[1] == 2 * channels:
            prediction, v = output.float().chunk(2, dim=1)
            vb = variance_bound(self.process, prediction, v, latents, noisy, timesteps, kind)
            metrics["vb"] = vb.detach()
            loss = mse + vb
        return LossOutput(loss.mean(), metrics)

    def drop_captions(self, model: nn.Module, batch: LatentBatch, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Captions of the batch, null where drop (B,) is True."""
        embeds, mask = pad_captions(batch.caption_embeds, batch.caption_mask, self.caption_length or 0)
        if self.null_embeds is None:
            return drop_captions(embeds, mask, drop, unwrap(model).y_embedder.y_embedding)
        null = self.null_embeds = self.null_embeds.to(batch.caption_embeds.device)
        null_mask = torch.ones(len(null), dtype=torch.bool, device=null.device)
        return drop_captions(embeds, mask, drop, null, null_mask)


def predict(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    mask: Tensor,
    batch: LatentBatch,
    before_block: Callable[..., Tensor] | None = None,
    **inputs: Any,
) -> Tensor:
    """Run the network, with size conditions if it takes them; before_block: see `PixArt.forward`.

    inputs: further arguments of the network's forward.
    """
    options = inputs if before_block is None else {**inputs, "before_block": before_block}
    return model(noisy, timesteps, embeds, mask, **size_inputs(model, batch), **options)


def size_inputs(model: nn.Module, batch: LatentBatch) -> dict[str, Tensor]:
    """Size conditions as keyword arguments, for a network that takes them."""
    sizes = {"img_hw": batch.img_hw, "aspect_ratio": batch.aspect_ratio}
    return sizes if unwrap(model).config.micro_condition else {}


def unwrap(model: nn.Module) -> Any:
    """The network inside torch's distributed wrapper, if there is one."""
    return getattr(model, "module", model)
