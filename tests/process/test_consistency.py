"""The formulas of latent consistency models, against diffusers' schedulers and the published grid."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from diffusion.inference.solvers import PROCESS
from diffusion.process import IDDPM, DDIMGrid, boundary_scalings, mean_square, pseudo_huber


def test_boundary_is_that_of_the_sampler() -> None:
    scheduler = LCMScheduler(**PROCESS)
    timesteps = torch.tensor([0, 1, 19, 259, 999])
    c_skip, c_out = boundary_scalings(timesteps)
    for index, timestep in enumerate(timesteps):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        torch.testing.assert_close(c_skip[index].squeeze(), torch.as_tensor(expected[0]).float())
        torch.testing.assert_close(c_out[index].squeeze(), torch.as_tensor(expected[1]).float())
    assert (c_skip[0].item(), c_out[0].item()) == (1, 0)  # f(x, 0) = x


def test_the_grid_is_the_originals() -> None:
    begin, end = DDIMGrid(IDDPM(""), 50).interval(torch.tensor([0, 1, 49]))
    assert (begin.tolist(), end.tolist()) == ([19, 39, 999], [0, 19, 979])
    with pytest.raises(ValueError, match="must divide the 1000"):
        DDIMGrid(IDDPM(""), 30)


def test_a_step_is_ddims() -> None:
    grid = DDIMGrid(IDDPM(""), 50)
    # "leading" with an offset of 19 visits 19, 39, ..., 999; its last step ends at the noise of t = 0.
    scheduler = DDIMScheduler(
        **PROCESS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=19
    )
    scheduler.set_timesteps(50)
    x, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    begin, end = grid.interval(torch.tensor([0, 20, 49]))
    found = grid.step(grid.path.predict_x0(x, begin, eps), eps, end)
    for index, timestep in enumerate(begin):
        expected = scheduler.step(eps[index], int(timestep), x[index]).prev_sample
        torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=1e-5)


def test_consistency_of_the_true_noise_is_the_clean_sample() -> None:
    process = IDDPM("")
    grid = DDIMGrid(process, 50)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    begin, end = grid.interval(torch.tensor([5, 20, 49]))
    noisy = process.q_sample(x0, begin, noise)
    implied, _ = process.x0_and_noise(noise, noisy, begin, "epsilon")
    torch.testing.assert_close(grid.consistency(noisy, implied, begin), x0, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(grid.step(implied, noise, end), process.q_sample(x0, end, noise))


def test_distances() -> None:
    difference = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    expected = ((9 + 4) ** 0.5 - 2 + (16 + 4) ** 0.5 - 2) / 2
    torch.testing.assert_close(pseudo_huber(difference, 2.0), torch.tensor([expected, 0.0]))
    assert mean_square(difference).tolist() == [12.5, 0.0]
