"""Arms of the training rows: this repository's trainer, and diffusers' network in the loop its users write.

All do the same step on the same random data: draw from the posterior, add noise, 10 % null captions, forward and
backward in one precision (`compare.py` says which), clip, AdamW, average of the weights. Ours also trains the variance.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from abab import Setting
from bench_training_levers import ARMS
from pydantic import ValidationError
from random_parts import Size, as_diffusers, randomise, relative_error
from timed_training import make_config, write_features
from torch import Tensor
from torch.nn import functional as F

from diffusion.data import TrainBatch
from diffusion.errors import ConfigError
from diffusion.ranks import Ranks
from diffusion.training import Reporting, Trainer, denoising_objective

# Options of the config by arm, the one place that knows the fastest, which the levers tell. Extra packages take part
# where they are installed, by "auto".
_, _KERNELS, _ = ARMS["exact, fused, direct"]
OURS: dict[str, dict[str, Any]] = {
    "ours": {"compile": True, "cuda_graph": True, "kernels": {**_KERNELS, "mlp": "auto"}},
    "ours-fp8": {"compile": True, "cuda_graph": True, "kernels": {**_KERNELS, "fp8": "rowwise"}},
    "ours-compile": {"compile": True},
    "ours-eager": {},
}
OURS_ON_CPU = {"compile": True, "kernels": {"attention": "auto", "fused": True, "onednn": True, "bf16_stream": True}}
CLIP, DROPOUT, EMA = 0.01, 0.1, 0.9999


def random_batch(batch: int, pixels: int, tokens: int, channels: int, device: Any) -> TrainBatch:
    """Features of `batch` pictures that lie on the device, each with a caption of `tokens` tokens."""
    generator = torch.Generator(device).manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    side = pixels // 8
    return TrainBatch(
        latents_mean=normal(batch, 4, side, side),
        latents_std=normal(batch, 4, side, side).abs(),
        caption_embeds=normal(batch, tokens, channels).bfloat16(),
        caption_mask=torch.ones(batch, tokens, dtype=torch.bool, device=device),
        img_hw=torch.full((batch, 2), float(pixels), device=device),
        aspect_ratio=torch.ones(batch, device=device),
        sample_numbers=torch.arange(batch, device=device),
        keys=[""] * batch,
    )


class SteppedTrainer(Trainer):
    """A trainer whose steps are asked for one by one, on batches that are given."""

    def begin(self) -> None:
        """What `fit` does before its first step, without files and watchdog."""
        self._base_lr, self._factor = self.config.optimizer.lr, lambda step: 1.0
        self.started, self.first_step = time.perf_counter(), self.state.step
        self.window.begin()

    def step_on(self, batches: Iterator[TrainBatch]) -> Tensor:
        return self._train_step(batches, self.window).loss


class OurTraining:
    """`Trainer`'s step; `name` chooses the options."""

    def __init__(
        self,
        name: str,
        size: Size,
        pixels: int,
        tokens: int,
        settings: Sequence[Setting],
        folder: Path,
        device: Any,
        precision: torch.dtype,
    ) -> None:
        self.name, self.settings, self.owner = name, settings, self
        channels = size.text[0]
        store = folder / f"store-{name}"
        write_features(store, 2, pixels, channels)
        chosen = OURS_ON_CPU if name == "ours" and device.type == "cpu" else OURS[name]
        options = {
            **size.network,
            "caption_channels": channels,
            "mixed_precision": "bf16" if precision == torch.bfloat16 else "no",
            **chosen,
        }
        if pixels >= 1024:
            options["model"] = "PixArtMS_XL_2"
        try:
            config = make_config(store, pixels, 1, 10**6, **options)
        except ValidationError as error:
            reason = error.errors()[0]
            raise ConfigError(f"arm {name!r}: {reason['loc'][0]}: {reason['msg']}; take another arm") from error
        ranks = Ranks(str(device))
        self.trainer = SteppedTrainer(
            config, denoising_objective, folder / name, reporting=Reporting(tensorboard=False), ranks=ranks
        )
        self.network = randomise(self.trainer.state.network, seed=0)
        self.calls_to_wake = 1 if self.trainer.passes is None else 3  # of which the second records
        self.shape = (pixels, tokens, channels, ranks.device)
        self.trainer.begin()

    def build(self, setting: Setting) -> Callable[[], Any]:
        self._forget_graphs()  # of another batch
        batches = itertools.repeat(random_batch(setting.batch, *self.shape))
        return lambda: self.trainer.step_on(batches)

    def _forget_graphs(self) -> None:
        """They know where tensors lie, and hold memory."""
        if self.trainer.passes is not None:
            self.trainer.passes = self.trainer._recorded_passes(self.network)

    def rest(self) -> None:
        self._forget_graphs()
        self.trainer.state.settle()
        self.trainer.state.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterable[Tensor]:
        state = self.trainer.state
        averaged = [] if state.average is None else state.average.tensors.values()
        yield from itertools.chain(_tensors(state.network), _moments(state.optimizer), averaged)


class DiffusersNetwork:
    """What the arms of diffusers share: network, fused AdamW and average. Only one of them trains at a time."""

    def __init__(self, twin_of: Any, device: Any, precision: torch.dtype) -> None:
        self.model = as_diffusers(twin_of).train().requires_grad_()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, eps=1e-10, weight_decay=0.0, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.device = device
        self.precision = precision
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)

    def step(self, forward: Callable[..., Any], batch: TrainBatch, null: Tensor, alphas: Tensor) -> Tensor:
        """One optimiser step; forward: the model or its compiled form."""
        self.optimizer.zero_grad(set_to_none=True)
        count = len(batch.keys)
        latents = batch.latents_mean + batch.latents_std * torch.randn_like(batch.latents_std)
        latents, noise = latents * 0.18215, torch.randn_like(latents)
        timesteps = torch.randint(0, len(alphas), (count,), device=self.device)
        kept = alphas[timesteps].view(-1, 1, 1, 1)
        drop = torch.rand(count, 1, 1, device=self.device) < DROPOUT
        captions = torch.where(drop, null, batch.caption_embeds)
        with self.autocast:
            noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            output = forward(
                noisy,
                encoder_hidden_states=captions,
                timestep=timesteps,
                added_cond_kwargs=self.sizes(batch),
                encoder_attention_mask=batch.caption_mask,
                return_dict=False,
            )[0]
            loss = F.mse_loss(output[:, :4].float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - EMA)
        return loss.detach()

    def sizes(self, batch: TrainBatch) -> dict[str, Tensor | None]:
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        return {"resolution": batch.img_hw, "aspect_ratio": batch.aspect_ratio[:, None]}

    def compiled(self, how: str) -> Callable[..., Any]:
        """The forward pass, compiled whole or by block (what diffusers calls regional)."""
        for block in self.model.transformer_blocks:
            block._compiled_call_impl = None
            if how == "block":
                block.compile(fullgraph=True)
        return self.model if how == "block" else torch.compile(self.model, fullgraph=True)


class DiffusersTraining:
    """diffusers' network in a plain loop, eager or compiled as its settings say."""

    calls_to_wake = 1

    def __init__(
        self, name: str, shared: DiffusersNetwork, pixels: int, tokens: int, settings: Sequence[Setting]
    ) -> None:
        self.name, self.shared, self.settings, self.owner = name, shared, settings, shared
        self.shape = (pixels, tokens, shared.model.config.caption_channels, shared.device)

    def build(self, setting: Setting) -> Callable[[], Any]:
        batch, shared = random_batch(setting.batch, *self.shape), self.shared
        if shared.precision == torch.float32:  # no autocast then
            batch.caption_embeds = batch.caption_embeds.float()
        null = torch.randn_like(batch.caption_embeds[:1])
        alphas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float().to(shared.device)
        forward = shared.compiled(setting.compile) if setting.compile else shared.model
        eagerly = not setting.compile

        def call() -> Tensor:
            with _stance(eagerly):
                return shared.step(forward, batch, null, alphas)

        return call

    def rest(self) -> None:
        self.shared.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterable[Tensor]:
        shared = self.shared
        yield from itertools.chain(_tensors(shared.model), _moments(shared.optimizer), shared.average)


def disagreement(ours: Any, theirs: Any, batch: TrainBatch, device: Any) -> float:
    """Relative difference between the two networks on one input, before any step."""
    timesteps = torch.full((len(batch.keys),), 500, device=device)
    sizes = {"img_hw": batch.img_hw, "aspect_ratio": batch.aspect_ratio} if ours.config.micro_condition else {}
    embeds = batch.caption_embeds.float()
    shared = {"resolution": batch.img_hw, "aspect_ratio": batch.aspect_ratio[:, None]}
    with torch.no_grad(), _stance(True), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        given = theirs(batch.latents_mean, encoder_hidden_states=embeds, timestep=timesteps, added_cond_kwargs=shared,
                       encoder_attention_mask=batch.caption_mask, return_dict=False)[0]  # fmt: skip
        return relative_error(ours(batch.latents_mean, timesteps, embeds, batch.caption_mask, **sizes), given)


def _stance(eagerly: bool) -> AbstractContextManager[None]:
    """Within it, compiled modules run as they were written if `eagerly`."""
    return torch.compiler.set_stance("force_eager" if eagerly else "default")


def _tensors(module: Any) -> Iterator[Tensor]:
    yield from itertools.chain(module.parameters(), module.buffers())


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)
