"""ControlNet: the base exactly when it is silent, and the flow of the paper's figure when it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.models import ControlPixArt, PixArt
from diffusion.models.attention import expand_caption_mask
from tests.checkpoints.tiny_files import control_state
from tests.models.test_pixart import SMALL, inputs, randomized

OPTIONS = {**SMALL, "depth": 5}


def control_latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def randomized_control(num_blocks: int = 3) -> ControlPixArt:
    model = ControlPixArt(randomized(PixArt(**OPTIONS)), num_blocks)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.controlnet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def by_hand(model: ControlPixArt, condition: Tensor, strength: float) -> Tensor:
    """PixArt-delta, Fig. 3, block by block, from the parts of the base model."""
    base, batch = model.base_model, inputs()
    positions = base.position_embedding()
    tokens = base.x_embedder(batch["latents"]) + positions
    control = base.x_embedder(condition) + positions
    time = base.t_embedder(batch["timesteps"])
    caption, mask = base.y_embedder(batch["caption_embeds"]), expand_caption_mask(batch["caption_mask"])
    shared = (caption, mask, base.t_block(time), (4, 4))
    tokens = base.blocks[0](tokens, *shared)
    for index, copy in enumerate(model.controlnet):
        if index == 0:
            control = tokens + copy.before_proj(control)
        control = copy.copied_block(control, *shared)
        tokens = base.blocks[index + 1](tokens + strength * copy.after_proj(control), *shared)
    for block in base.blocks[len(model.controlnet) + 1 :]:
        tokens = block(tokens, *shared)
    patches = base.final_layer(tokens, time).unflatten(1, (4, 4)).unflatten(3, (2, 2, 8))
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_flow_is_that_of_the_paper(strength: float) -> None:
    model = randomized_control()
    with torch.no_grad():
        found = model(**inputs(), control_latents=control_latents(), condition_strength=strength)
        torch.testing.assert_close(found, by_hand(model, control_latents(), strength), atol=1e-5, rtol=1e-5)
        assert (found - model.base_model(**inputs())).abs().max() > 1e-2


def test_a_silent_control_is_the_base_exactly() -> None:
    base = randomized(PixArt(**OPTIONS))
    fresh, trained = ControlPixArt(base, 4).eval(), randomized_control()
    with torch.no_grad():
        expected = base(**inputs())
        assert torch.equal(fresh(**inputs(), control_latents=control_latents()), expected)
        assert torch.equal(trained(**inputs()), expected)
        assert torch.equal(trained(**inputs(), control_latents=control_latents(), condition_strength=0.0), expected)


def test_keys_are_the_originals_and_the_base_is_frozen() -> None:
    with torch.device("meta"):
        base = PixArt(micro_condition=True, input_size=128)
        model = ControlPixArt(base)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in control_state(base, 13).items()
    }
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (len(model.state_dict()), trained) == (668, 294_917_760)


def test_wrong_uses_are_explained() -> None:
    base = PixArt(**OPTIONS)
    with pytest.raises(ValueError, match="must be between 1 and 4"):
        ControlPixArt(base, 5)
    with pytest.raises(ValueError, match="must have the shape"):
        ControlPixArt(base, 2)(**inputs(), control_latents=torch.zeros(1, 4, 8, 8))
