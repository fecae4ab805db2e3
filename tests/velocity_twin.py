"""A network that predicts velocity and is otherwise one that predicts noise: the same function, another output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.models import PixArt
from diffusion.models.pixart import TimeSignal
from diffusion.process import IDDPM


class VelocityTwin(PixArt):
    """v = (eps - sigma x_t) / alpha, from the noise that the weights say; variance channels stay."""

    _asked: Tensor  # the timesteps of the coming prediction

    def embed_time(self, timesteps: Tensor, **sizes: Any) -> TimeSignal:
        self._asked = timesteps
        return super().embed_time(timesteps, **sizes)

    def predict(self, latents: Tensor, *signals: Any, **options: Any) -> Tensor:
        output = super().predict(latents, *signals, **options)
        channels = latents.shape[1]
        alpha_bar = IDDPM().alphas_cumprod.to(latents.device)[self._asked.long()].view(-1, 1, 1, 1)
        eps = output[:, :channels].double()
        velocity = (eps - (1 - alpha_bar).sqrt() * latents) / alpha_bar.sqrt()
        return torch.cat([velocity.to(output.dtype), output[:, channels:]], dim=1)


def velocity_twin(network: PixArt) -> VelocityTwin:
    """It has copies of the network's weights."""
    twin = VelocityTwin(**{**vars(network.config), "prediction_type": "v_prediction"})
    twin.load_state_dict(network.state_dict())
    return twin.train(network.training)
