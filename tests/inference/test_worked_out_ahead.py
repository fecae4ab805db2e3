"""What a call works out once for all its steps gives the pictures of the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.inference.conditions import Conditions
from diffusion.inference.guided import Guidance, GuidedPrediction
from diffusion.inference.shortcuts import Shortcuts
from diffusion.inference.solver_run import SolverRun
from diffusion.models import ControlPixArt
from diffusion.models.kernels import Kernels, use_kernels
from tests.inference.solver_cases import ARGUMENTS, CAPTURABLE, STEPS, by_run, conditions, noise, plain
from tests.inference.tiny_pipeline import load_quietly, tiny_transformer


@pytest.mark.parametrize("algorithm", [*CAPTURABLE, "flow-euler"])
def test_cached_text_changes_no_bit(algorithm: str) -> None:
    network, steps = tiny_transformer(), STEPS.get(algorithm, 5)
    with torch.no_grad():
        assert torch.equal(by_run(network, algorithm, steps), plain(network, algorithm, steps))


def test_text_and_time_are_embedded_once() -> None:
    network, calls = tiny_transformer(), []
    for part in (network.y_embedder, network.t_block, *(block.cross_attn.kv_linear for block in network.blocks)):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        by_run(network, "dpm-solver", 6, embeds_time_ahead=True)
    assert len(calls) == 2 + len(network.blocks)


def test_time_embedded_ahead_is_the_same_up_to_rounding() -> None:
    network = tiny_transformer()
    with torch.no_grad():
        found = by_run(network, "dpm-solver", 6, embeds_time_ahead=True)
        torch.testing.assert_close(found, plain(network, "dpm-solver", 6), atol=1e-4, rtol=1e-4)


def test_size_conditions_are_embedded_ahead_too() -> None:
    network = tiny_transformer(micro_condition=True)
    given = Conditions(
        conditions().embeds,
        conditions().mask,
        {"img_hw": torch.tensor([64.0, 96.0]).expand(4, 2), "aspect_ratio": torch.tensor(64 / 96).expand(4)},
    )
    timestep = torch.tensor(500)
    with torch.no_grad():
        each = GuidedPrediction(network, given, Guidance(4.5))(noise(), timestep)
        ahead = GuidedPrediction(network, given, Guidance(4.5), timesteps=[torch.tensor(999), timestep])
        torch.testing.assert_close(ahead(noise(), timestep), each, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_to_float64_as_the_plain_loop() -> None:
    network = tiny_transformer()
    with torch.no_grad():
        exact = plain(network.double(), "dpm-solver", 6, torch.float64)
        network = tiny_transformer().bfloat16()
        plainly = plain(network, "dpm-solver", 6, torch.bfloat16) - exact
        fast = by_run(network, "dpm-solver", 6, embeds_time_ahead=True) - exact
    assert 0 < fast.norm() <= 1.5 * plainly.norm()


@pytest.mark.parametrize("text", ["packed", "spare"])
def test_text_without_a_mask_is_the_same_up_to_rounding(text: str) -> None:
    network, expected = tiny_transformer(), plain(tiny_transformer(), "dpm-solver", 6)
    use_kernels(network, Kernels(text=text))
    for shortcuts in (None, Shortcuts()):
        found = by_run(network, "dpm-solver", 6, embeds_time_ahead=True, shortcuts=shortcuts)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    by_run(network, "dpm-solver", 6, embeds_time_ahead=True, shortcuts=Shortcuts(guidance_until=0.5))


def test_a_controlnet_has_text_of_its_own() -> None:
    base = tiny_transformer(depth=3)
    network = ControlPixArt(base, 2)
    with torch.no_grad():
        for parameter in network.controlnet.parameters():
            parameter.add_(0.05)
        latents, given = torch.cat([noise(), noise()]), conditions()
        timesteps = torch.full((4,), 300.0)
        expected = network(latents, timesteps, given.embeds, given.mask, control_latents=latents)
        text = network.embed_text(given.embeds, given.mask, project=True)
        found = network.predict(latents, network.embed_time(timesteps), text, control_latents=latents)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("controlled", [False, True])
def test_tables_of_blocks_are_added_once(controlled: bool) -> None:
    base = tiny_transformer(depth=3)
    network: Any = ControlPixArt(base, 2) if controlled else base
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    latents, given = torch.cat([noise(), noise()]), conditions()
    options = {"control_latents": latents} if controlled else {}
    with torch.no_grad():
        text, plain = network.embed_text(given.embeds, given.mask), network.embed_time(torch.tensor([700.0, 300.0]))
        time = network.with_tables(plain)
        for row in (0, 1):
            expected = network.predict(latents, plain.row(row), text, **options)
            assert torch.equal(network.predict(latents, time.row(row), text, **options), expected)
        base.blocks[2].to("meta")  # as where a plan brings blocks one by one
        assert network.with_tables(plain).tables is None


@pytest.mark.parametrize("text", ["mask", "packed", "spare", "direct"])
@pytest.mark.parametrize("controlled", [False, True])
def test_what_captions_of_one_token_give_is_worked_out_once(text: str, controlled: bool) -> None:
    base = tiny_transformer(depth=3)
    network: Any = ControlPixArt(base, 2) if controlled else base
    use_kernels(network, Kernels(text=text))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    latents, given, timesteps = torch.cat([noise(), noise()]), conditions(), torch.full((4,), 300.0)
    mask = given.mask.clone()
    mask[:2] = torch.arange(mask.shape[1]) < 1
    options = {"control_latents": latents} if controlled else {}
    with torch.no_grad():
        expected = network(latents, timesteps, given.embeds, mask, **options)
        known = network.embed_text(given.embeds, mask, project=True, alone=2)
        found = network.predict(latents, network.embed_time(timesteps), known, **options)
        unprojected = network.embed_text(given.embeds, mask, alone=2)  # where nothing is worked out, nothing is known
        whole = network.predict(latents, network.embed_time(timesteps), unprojected, **options)
    assert torch.equal(whole, expected)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("negative", "rows"), [(None, 1), ("", 1), (" ", 1), ("blue", 2)])
def test_a_blank_negative_prompt_takes_no_cross_attention(
    pipeline_folder: Path, negative: str | None, rows: int
) -> None:
    pipe, seen = load_quietly(pipeline_folder), list[int]()
    expected = pipe("a red apple", negative_prompt=negative, **ARGUMENTS).images
    query = pipe.transformer.blocks[0].cross_attn.q_linear
    query.register_forward_hook(lambda layer, given, output: seen.append(len(given[0])))
    pipe.enable_fast_sampling()
    found = pipe("a red apple", negative_prompt=negative, **ARGUMENTS).images
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert seen == [rows] * 3
    assert len({SolverRun(pipe.transformer, pipe.scheduler, 3, alone=alone).key for alone in (0, 1)}) == 2
