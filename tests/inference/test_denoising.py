from __future__ import annotations

import pytest
import torch

from diffusion.errors import PromptError
from diffusion.inference import guide
from diffusion.inference.denoising import initial_noise, picture_generators

# Unconditional 1, conditional 3 in the four noise channels; 10 and 20 in the variance channels.
OUTPUT = torch.tensor([[1.0] * 4 + [10.0] * 4, [3.0] * 4 + [20.0] * 4])[:, :, None, None]


def test_guidance_acts_on_all_noise_channels() -> None:
    assert guide(OUTPUT, 4, 2.5, keep_variance=False).flatten().tolist() == [6.0] * 4


def test_variance_is_that_of_the_conditional_half_unguided() -> None:
    assert guide(OUTPUT, 4, 2.5, keep_variance=True).flatten().tolist() == [6.0] * 4 + [20.0] * 4


def test_initial_noise_is_what_stock_diffusers_draws() -> None:
    generators, seeds = picture_generators(3, 5, None)
    noise = initial_noise(3, (4, 6, 8), generators, torch.device("cpu"))
    assert seeds == [5, 6, 7]
    for index in range(3):
        expected = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5 + index))
        assert torch.equal(noise[index : index + 1], expected)


def test_random_seeds_follow_torchs_global_generator() -> None:
    torch.manual_seed(0)
    _, first = picture_generators(4, None, None)
    torch.manual_seed(0)
    assert picture_generators(4, None, None)[1] == first
    assert len(set(first or [])) == 4


def test_a_list_of_generators_has_one_a_picture() -> None:
    with pytest.raises(PromptError, match="generator has 1 entries for 2 pictures"):
        picture_generators(2, None, [torch.Generator()])
