"""Initial weights of PixArt (the paper's adaLN-single variant of DiT's recipe)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusion.models.latent_transformer import LatentTransformer
    from diffusion.models.pixart import PixArt


def initialize_weights(model: PixArt) -> None:
    """Xavier for linear layers, std 0.02 for embedders, zero for what must start silent.

    Cross-attention outputs and the final projection start at zero, so a fresh network predicts exactly zero;
    self-attention, MLP outputs and t_block do not (unlike adaLN-Zero).
    """
    initialize_linear(model)
    embedders: list[Any] = [model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.t_block[1]]
    embedders += [model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2]
    if model.config.micro_condition:
        embedders += [embedder.mlp[i] for embedder in (model.csize_embedder, model.ar_embedder) for i in (0, 2)]
    for layer in embedders:
        nn.init.normal_(layer.weight, std=0.02)
    blocks: Any = model.blocks
    for block in blocks:
        zero_(block.cross_attn.proj)
        if block.attn.sr_ratio > 1 and block.attn.sampling == "conv":
            nn.init.constant_(block.attn.sr.weight, 1 / block.attn.sr_ratio**2)  # starts as average pooling
            nn.init.zeros_(block.attn.sr.bias)
    zero_(model.final_layer.linear)


def initialize_linear(model: LatentTransformer) -> None:
    """Xavier for linear layers and the patch embedding, biases of linear layers zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj.weight
    nn.init.xavier_uniform_(patches.view(patches.shape[0], -1))


def zero_(layer: nn.Linear) -> None:
    """Silence a layer: weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
