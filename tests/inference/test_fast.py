"""Fast drawing draws the same pictures: recorded loops, streams of calls, and what is said when not."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.errors import CheckpointError, PromptError
from diffusion.graphs import GraphCache, RecordedWork, addresses
from diffusion.inference import PixArtPipeline, make_scheduler, read_recipe
from diffusion.inference.batch import sample_to_folder
from diffusion.inference.fast import padded_length
from diffusion.inference.solver_run import SolverRun
from diffusion.inference.solvers import is_capturable
from tests.inference.solver_cases import ARGUMENTS, CAPTURABLE, STEPS, conditions, generators, noise
from tests.inference.tiny_pipeline import load_quietly, tiny_transformer, write_tiny_pipeline

BUNDLED = Path(__file__).parents[2] / "output/pretrained_models/emoji-256"


class NoCopyToDevice(TorchDispatchMode):
    """Refuses copies from host memory to tensors of the device; 0-dim scalars are arguments of kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[-1 if "copy_" in str(func) else 0] if args else None
        if isinstance(result, Tensor) and isinstance(source, Tensor) and "copy" in str(func):
            assert source.device == result.device, f"{func} from {source.device} to {result.device}"
        return result


@pytest.mark.parametrize("algorithm", [*CAPTURABLE, "flow-euler"])
def test_the_loop_needs_nothing_of_the_host(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's "meta" device there are no values: whoever reads one on the host gets an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    network = tiny_transformer().to("meta")
    steps = STEPS.get(algorithm, 5)
    run = SolverRun(network, make_scheduler(algorithm), steps, first_step=1, guided=True, embeds_time_ahead=True)
    tensors = run.tensors(noise(), conditions(), 4.5, noise(), generators())
    tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with torch.no_grad(), NoCopyToDevice():
        assert run(tensors).shape == noise().shape


def test_the_watch_over_the_host_sees_reads_and_copies() -> None:
    values = torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        float(values.sum())
    with pytest.raises(AssertionError, match="from cpu to meta"), NoCopyToDevice():
        torch.zeros(3).to("meta")


def test_solvers_that_need_the_host_are_known() -> None:
    assert all(is_capturable(make_scheduler(algorithm)) for algorithm in (*CAPTURABLE, "flow-euler"))
    assert not any(is_capturable(make_scheduler(algorithm)) for algorithm in ("sa-solver", "iddpm"))
    noisy = type(make_scheduler("dpm-solver")).from_config(
        make_scheduler("dpm-solver").config, algorithm_type="sde-dpmsolver++"
    )
    assert not is_capturable(noisy)


def test_a_recorded_run_serves_other_noise_and_prompts() -> None:
    run = SolverRun(tiny_transformer(), make_scheduler("lcm"), 4, guided=True, embeds_time_ahead=True)
    first = run.tensors(noise(), conditions(), 4.5, None, generators())
    other = run.tensors(noise() * 0.5, conditions(), 2.0, None, generators()[::-1])
    other["embeds"] = other["embeds"].flip(1)
    with torch.no_grad():
        recorded = RecordedWork(run, first)
        found = recorded(other)
        assert torch.equal(found, run(other))
        kept = found.clone()
        assert torch.equal(recorded(first), run(first))
        assert torch.equal(found, kept)


class Doubling:
    """A work that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        self.runs += 1
        return 2 * tensors["x"]


def test_graphs_are_recorded_at_the_second_sight_and_few_are_kept() -> None:
    cache, work = GraphCache(limit=2), Doubling()
    for repeat in range(3):
        for key in ("a", "b"):
            value = torch.full((3,), float(repeat))
            assert torch.equal(cache.run(key, work, {"x": value}), 2 * value)
    assert cache.num_recorded == 2
    cache.run("a", work, {"x": torch.zeros(4)})  # another shape: b, the least recently used but one, stays
    cache.run("b", work, {"x": torch.zeros(3)})
    assert cache.num_recorded == 2
    cache.run("a", work, {"x": torch.zeros(3)})
    cache.run("a", work, {"x": torch.zeros(3)})
    assert cache.num_recorded == 3
    cache.run("a", work, {"x": torch.zeros(3)}, weights="moved")
    cache.run("a", work, {"x": torch.zeros(3)}, weights="moved")
    assert cache.num_recorded == 4


def test_work_that_cannot_be_recorded_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(*_: Any) -> None:
        try:
            raise RuntimeError("a copy from the host\nand more")
        finally:
            raise RuntimeError("a previous error during capture")

    monkeypatch.setattr(RecordedWork, "__init__", record)
    cache, work = GraphCache(limit=2), Doubling()
    assert all(torch.equal(cache.run("a", work, {"x": torch.ones(1)}), torch.full((1,), 2.0)) for _ in range(3))
    assert caplog.messages == ["no CUDA graph, the work runs by single launches: a copy from the host"]


def test_addresses_are_those_of_all_weights() -> None:
    network = tiny_transformer()
    assert set(addresses(network)) == {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}


def test_keys_tell_runs_apart() -> None:
    network = tiny_transformer()
    runs = [
        SolverRun(network, make_scheduler("dpm-solver"), 5),
        SolverRun(network, make_scheduler("dpm-solver"), 6),
        SolverRun(network, make_scheduler("dpm-solver"), 5, guided=True),
        SolverRun(network, make_scheduler("dpm-solver"), 5, first_step=2),
        SolverRun(network, make_scheduler("ddim"), 5),
        SolverRun(network, make_scheduler("dpm-solver", prediction_type="v_prediction"), 5),
    ]
    assert len({run.key for run in runs}) == len(runs)
    assert SolverRun(network, make_scheduler("dpm-solver"), 5).key == runs[0].key


@pytest.mark.parametrize(("tokens", "expected"), [(1, 32), (32, 32), (33, 64), (120, 120), (121, 300), (301, 301)])
def test_captions_are_padded_to_few_lengths(tokens: int, expected: int) -> None:
    assert padded_length(tokens) == expected


def test_a_call_looks_for_its_device_once(pipeline: PixArtPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def look(self: PixArtPipeline) -> torch.device:
        asked.append(torch.device("cpu"))
        return asked[-1]

    monkeypatch.setattr(PixArtPipeline, "_execution_device", property(look))
    pipeline("a red apple", **ARGUMENTS)
    assert len(asked) == 1
    pipeline("a red apple", **ARGUMENTS)
    assert len(asked) == 2  # it may have been moved in between


@pytest.mark.parametrize("away", [None, "vae", "controlnet", "hook"])
def test_a_card_that_holds_all_parts_is_found_without_a_walk(pipeline_folder: Path, away: str | None) -> None:
    pipeline = load_quietly(pipeline_folder)
    with FakeTensorMode():
        there, elsewhere = (torch.nn.Parameter(torch.empty(1, device=name)) for name in ("cuda:0", "cpu"))
    assert pipeline._common_card() is None  # on a CPU
    for name in ("text_encoder", "vae", "transformer"):
        module = torch.nn.Module()
        module.first = there if name != away else elsewhere
        setattr(pipeline, name, module)
    if away == "controlnet":
        pipeline.controlnet = torch.nn.ParameterList([elsewhere])
    if away == "hook":
        pipeline.vae._diffusers_hook = object()
    assert pipeline._common_card() == (torch.device("cuda:0") if away is None else None)


def test_negative_prompts_are_encoded_once(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, encoded = load_quietly(pipeline_folder), list[str]()
    encode = pipe._encode_captions

    def watched(captions: list[str], **options: Any) -> Any:
        encoded.extend(captions)
        return encode(captions, **options)

    monkeypatch.setattr(pipe, "_encode_captions", watched)
    pipe.enable_fast_sampling()
    found = [pipe(prompt, negative_prompt="blue", **ARGUMENTS).images for prompt in ("a cat", "a dog", "a cat")]
    assert encoded == ["a cat", "blue", "a dog", "a cat"]
    assert torch.equal(found[0], found[2])
    norm = pipe.text_encoder.encoder.final_layer_norm
    norm.weight = torch.nn.Parameter(2 * norm.weight)
    assert not torch.equal(pipe("a cat", negative_prompt="blue", **ARGUMENTS).images, found[0])
    assert encoded[4:] == ["a cat", "blue"]


def test_the_fast_pipeline_draws_the_same_and_says_once_what_it_cannot(
    pipeline_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load_quietly(pipeline_folder)
    expected = pipe("a red apple", **ARGUMENTS).images
    pipe.enable_fast_sampling()
    with caplog.at_level(logging.INFO, logger="diffusion"):
        found = [pipe("a red apple", **ARGUMENTS).images for _ in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert sum("CUDA graphs need a card" in message for message in caplog.messages) == 1
    pipe.disable_fast_sampling()
    assert torch.equal(pipe("a red apple", **ARGUMENTS).images, expected)


def test_a_stream_of_calls_gives_what_the_calls_give(pipeline: PixArtPipeline) -> None:
    calls = [{"prompt": prompt, **ARGUMENTS} for prompt in ("a red apple", "a cat", "a dog")]
    expected = [pipeline(**call) for call in calls]
    found = list(pipeline.stream(calls))
    assert [output.recipes for output in found] == [output.recipes for output in expected]
    assert all(torch.equal(one.images, other.images) for one, other in zip(found, expected))


def test_lossy_savings_change_the_picture_a_little(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    expected = pipe("a red apple", **{**ARGUMENTS, "num_inference_steps": 6}).images
    for settings in ({"guidance_until": 0.5}, {"reuse_every": 2}, {"guidance_until": 0.5, "reuse_every": 3}):
        pipe.enable_fast_sampling(**settings)
        found = pipe("a red apple", **{**ARGUMENTS, "num_inference_steps": 6}).images
        assert 0 < (found - expected).abs().mean() < 0.5 * expected.std()


def test_a_vae_in_bfloat16_hardly_changes_a_colour() -> None:
    pipe, settings = load_quietly(BUNDLED), {"num_inference_steps": 4, "seed": 1, "output_type": "np"}
    exact = pipe("red apple", **settings).images
    pipe.enable_fast_sampling(compile=False, vae_bfloat16=True)
    found = pipe("red apple", **settings).images
    assert pipe.vae.dtype == torch.bfloat16
    steps = abs(np.round(found * 255) - np.round(exact * 255))
    assert steps.any() and (steps <= 1).mean() > 0.995 and steps.max() <= 8
    assert -10 * np.log10(np.mean((found - exact) ** 2)) > 50  # dB


def test_shortcuts_save_passes(pipeline_folder: Path) -> None:
    pipe, rows, runs = load_quietly(pipeline_folder), [], []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    pipe.transformer.blocks[1].register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    pipe.enable_fast_sampling(guidance_until=0.5, reuse_every=3)
    pipe("a red apple", **{**ARGUMENTS, "num_inference_steps": 8})
    assert rows == [2, 2, 2, 2, 1, 1, 1, 1]
    assert runs == [2, 2, 1, 1]  # steps 0, 3, 6 and the last


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_until": 1.5}, "guidance_until=1.5 must lie in 0..1"),
        ({"reuse_every": 0}, "reuse_every=0 must be an integer of at least 1"),
    ],
)
def test_wrong_settings_are_refused(pipeline: PixArtPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        pipeline.enable_fast_sampling(**settings)


def test_weights_are_changed_before_a_plan_holds_them(tmp_path: Path) -> None:
    pipe = load_quietly(write_tiny_pipeline(tmp_path / "tiny"))
    pipe.enable_fast_sampling(fp8=True)
    with pytest.raises(CheckpointError, match="cannot be saved with FP8 layers"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.set_memory_plan("full", "cpu")
    with pytest.raises(PromptError, match="before the memory plan is set"):
        pipe.enable_fast_sampling(fp8=True)


def test_recipes_say_what_changed_the_picture(pipeline_folder: Path, tmp_path: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    settings = {"num_inference_steps": 2}
    prompts = ["a red apple", "a cat " * 20, "a dog", "an old tree"]  # the second is of another padded length
    plain_paths, _ = sample_to_folder(pipe, prompts, tmp_path / "plain", model="tiny", batch_size=2, settings=settings)
    pipe.enable_fast_sampling()
    exact, _ = sample_to_folder(pipe, prompts, tmp_path / "fast", model="tiny", batch_size=2, settings=settings)
    for one, other in zip(plain_paths, exact):
        assert read_recipe(one) == read_recipe(other)
        difference = np.asarray(Image.open(one), dtype=float) - np.asarray(Image.open(other), dtype=float)
        assert abs(difference).max() <= 1
    pipe.enable_fast_sampling(guidance_until=0.5)
    lossy, _ = sample_to_folder(pipe, prompts[:1], tmp_path / "lossy", model="tiny", settings=settings)
    assert read_recipe(lossy[0])["fast"] == {"guidance_until": 0.5}


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_and_the_next_process_finds_the_kernels(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    code = (
        "import sys, torch\n"
        "from torch._dynamo.utils import counters\n"
        "from tests.inference.tiny_pipeline import load_quietly\n"
        "pipe = load_quietly(sys.argv[1])\n"
        "given = dict(num_inference_steps=2, seed=5, output_type='pt')\n"
        "expected = pipe('a red apple', **given).images\n"
        "pipe.enable_fast_sampling(compile=True)\n"
        "found = pipe('a red apple', **given).images\n"
        "torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)\n"
        "found = counters['inductor']\n"
        "print(found['fxgraph_cache_hit'], found['fxgraph_cache_miss'], counters['stats']['unique_graphs'])\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    printed = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(pipeline_folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append([int(number) for number in done.stdout.split()])
    assert any((tmp_path / "pixart" / "kernels").iterdir())
    (hits, misses, graphs), (later_hits, later_misses, _) = printed
    assert misses > 0 and later_misses == 0 and later_hits >= hits
    assert graphs == 1  # all blocks and steps share one compilation


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@CUDA
@pytest.mark.parametrize("algorithm", [*CAPTURABLE, "sa-solver"])
def test_the_graph_draws_the_pictures_of_the_loop_bit_for_bit(pipeline_folder: Path, algorithm: str) -> None:
    pipe = load_quietly(pipeline_folder, device="cuda", torch_dtype=torch.bfloat16)
    pipe.scheduler = make_scheduler(algorithm)
    calls = [
        {"prompt": prompt, "seed": seed, "guidance_scale": scale, "num_inference_steps": 4, "output_type": "pt"}
        for prompt, seed, scale in (("a cat", 0, 4.5), ("a red apple", 1, 3.0), ("a dog", 2, 4.5))
    ]
    pipe.enable_fast_sampling(graph=False, compile=False)
    expected = [pipe(**call).images for call in calls]
    pipe.enable_fast_sampling(compile=False)
    found = [pipe(**call).images for call in calls]
    streamed = [output.images for output in pipe.stream(calls)]
    assert pipe._fast is not None
    assert pipe._fast.solver_graphs.num_recorded == (0 if algorithm == "sa-solver" else 1)
    for one, other, third in zip(expected, found, streamed):
        assert torch.equal(one, other) and torch.equal(one, third)
