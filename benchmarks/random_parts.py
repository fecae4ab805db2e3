"""Networks with random weights, made on the device they run on: PixArt in our form and in diffusers', T5 and VAE.

Zeros would be multiplied faster than a trained network's weights, so every matrix is normal with the deviation that
keeps its input's size, zero-initialised ones too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "output/pretrained_models/emoji-256/tokenizer"


@dataclass(frozen=True)
class Size:
    """How large the networks are: T5-XXL, PixArt XL/2 and SD's VAE, or all of them tiny.

    text: width, layers and heads of T5. network: arguments of `build_model` beside the picture size. vae: channels.
    """

    text: tuple[int, int, int]
    network: dict[str, Any]
    vae: tuple[int, ...]
    norm_groups: int


FULL = Size((4096, 24, 64), {}, (128, 256, 512, 512), 32)
TINY = Size((32, 2, 4), {"hidden_size": 48, "depth": 2, "num_heads": 4}, (8, 8, 8, 8), 4)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill all parameters in place, from a seed: matrices and kernels normal, biases small, gains about 1."""
    first = next(model.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            deviation = 0.02 if parameter.ndim < 2 or "table" in name else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if gain else 0.0, deviation, generator=generator)
    return model


def make_transformer(size: Size, pixels: int, device: Any, dtype: Any) -> Any:
    """PixArt for one picture size, with random weights; 1024 px with the size conditions of alpha's 1024 px model."""
    from diffusion.models import build_model

    name = "PixArtMS_XL_2" if pixels >= 1024 else "PixArt_XL_2"
    options = {"input_size": pixels // 8, "pe_interpolation": max(pixels / 512, 1.0), "caption_channels": size.text[0]}
    with torch.device(device):
        network = build_model(name, **{**options, **size.network})
    return randomise(network.to(dtype), seed=0).eval()


def as_diffusers(network: Any) -> Any:
    """The same weights, copied, in stock diffusers' class."""
    from diffusers import PixArtTransformer2DModel

    from diffusion.checkpoints import config_to_diffusers, native_to_diffusers

    with torch.device("meta"):
        twin = PixArtTransformer2DModel.from_config(config_to_diffusers(network.config))  # passes over our own fields
    state = native_to_diffusers({key: tensor.detach() for key, tensor in network.state_dict().items()})
    twin.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, strict=False, assign=True)
    twin.pos_embed.pos_embed = network.position_embedding()  # a buffer that no file holds
    left = [name for name, tensor in [*twin.named_parameters(), *twin.named_buffers()] if tensor.is_meta]
    assert not left, f"weights that diffusers has and PixArt has not: {left}"
    return twin.eval()


def text_config(width: int, layers: int, heads: int) -> Any:
    """A T5 encoder with the proportions and the vocabulary of T5 v1.1."""
    from transformers import T5Config

    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=width // heads,
        d_ff=width * 5 // 2,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def make_text_encoder(size: Size, device: Any, dtype: Any) -> tuple[Any, Any]:
    """The bundled tokenizer, and a T5 encoder of that vocabulary with random weights."""
    from transformers import AutoTokenizer, T5EncoderModel

    config = text_config(*size.text)
    with _made_on(device, dtype):
        encoder = T5EncoderModel(config).eval().requires_grad_(False)
    return AutoTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True), encoder


def make_vae(size: Size, pixels: int, device: Any, dtype: Any) -> Any:
    """A KL-VAE in the shape of SD's, with random weights."""
    from diffusers import AutoencoderKL

    with _made_on(device, dtype):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            norm_num_groups=size.norm_groups,
            sample_size=pixels,
        )
    return randomise(vae, seed=3).eval().requires_grad_(False)


class _made_on:
    """Modules built within are on a device and of a dtype from the start: T5-XXL in float32 would fill a card."""

    def __init__(self, device: Any, dtype: Any) -> None:
        self.device, self.dtype = torch.device(device), dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.device.__enter__()

    def __exit__(self, *caught: Any) -> None:
        self.device.__exit__(*caught)
        torch.set_default_dtype(self.before)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| over all elements, in float32."""
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()
