"""Drawing with a ControlNet: a tiny one around a tiny base, and HED of full shape."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffusion.checkpoints import load_controlnet, load_transformer
from diffusion.checkpoints.weights import CONFIG_IN_METADATA
from diffusion.errors import CheckpointError, PromptError
from diffusion.images import detect_edges, encode_moments, resize_and_crop, to_tensor
from diffusion.inference import PixArtPipeline, guide, make_scheduler, model_fingerprint, read_recipe
from diffusion.inference.batch import load_pipeline
from diffusion.inference.memory import PLANS, Workload, expected_peak
from diffusion.inference.solvers import ALGORITHMS
from diffusion.models import HED, ControlPixArt, PixArt
from tests.checkpoints.tiny_files import control_state
from tests.doors import Door
from tests.inference.test_memory import full_size_parts
from tests.inference.tiny_pipeline import SIZE_PX, load_quietly, tiny_transformer, write_tiny_pipeline
from tests.models.test_hed import random_hed

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "output/pretrained_models/emoji-256"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARGUMENTS: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "output_type": "latent"}
DEPTH, BLOCKS = 3, 2


def write_control(base: PixArt, path: Path) -> Path:
    """A ControlNet file around a base, as the original writes them, with weights that change what is drawn."""
    state = control_state(base, BLOCKS)
    generator = torch.Generator().manual_seed(1)
    for key in state:
        if key.startswith("controlnet.") and "copied_block" not in key:
            state[key] = torch.randn(state[key].shape, generator=generator) * 0.2
    if path.suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path, {CONFIG_IN_METADATA: json.dumps(asdict(base.config))})
    return path


def picture(seed: int = 0, size: tuple[int, int] = (SIZE_PX, SIZE_PX)) -> Image.Image:
    """White lines on black."""
    lines = np.zeros((*size, 3), np.uint8)
    lines[np.random.default_rng(seed).integers(0, size[0], 4)] = 255
    lines[:, np.random.default_rng(seed + 1).integers(0, size[1], 4)] = 255
    return Image.fromarray(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("control") / "tiny", depth=DEPTH)


@pytest.fixture(scope="module")
def control_file(folder: Path) -> Path:
    return write_control(tiny_transformer(depth=DEPTH), folder / "control.pth")


@pytest.fixture(scope="module")
def hed_file(folder: Path) -> Path:
    torch.save(random_hed().state_dict(), folder / "ControlNetHED.pth")
    return folder / "ControlNetHED.pth"


@pytest.fixture(scope="module")
def _controlled(folder: Path, control_file: Path) -> PixArtPipeline:
    return load_quietly(folder, controlnet=control_file)


@pytest.fixture
def pipe(_controlled: PixArtPipeline) -> PixArtPipeline:
    _controlled.scheduler = make_scheduler("dpm-solver")
    return _controlled


def condition_latents(pipe: PixArtPipeline, pixels: Tensor) -> Tensor:
    return encode_moments(pipe.vae, pixels)[0] * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_strength_0_is_the_base_bit_for_bit_and_1_is_not(folder: Path, pipe: PixArtPipeline, algorithm: str) -> None:
    base = load_quietly(folder, algorithm=algorithm)
    pipe.scheduler = make_scheduler(algorithm)
    expected = base("a cat", **ARGUMENTS).images
    silent = pipe("a cat", control_image=picture(), controlnet_conditioning_scale=0, **ARGUMENTS).images
    assert torch.equal(silent, expected)
    assert torch.equal(pipe("a cat", **ARGUMENTS).images, expected)
    changes = [
        (pipe("a cat", control_image=picture(), controlnet_conditioning_scale=scale, **ARGUMENTS).images - expected)
        for scale in (0.1, 1.0)
    ]
    assert 0 < changes[0].norm() < changes[1].norm() and changes[1].abs().max() > 0.01


@pytest.mark.parametrize("micro_condition", [False, True], ids=["512", "1024"])
def test_a_step_is_that_of_the_formulas(micro_condition: bool, tmp_path: Path) -> None:
    """The condition enters both halves of guidance, which leads towards the text alone."""
    options: dict[str, Any] = {"depth": DEPTH, "micro_condition": micro_condition}
    folder = write_tiny_pipeline(tmp_path / "tiny", **options)
    file = write_control(tiny_transformer(**options), tmp_path / "control.pth")
    pipe = load_quietly(folder, controlnet=file, algorithm="ddim")
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {**ARGUMENTS, "num_inference_steps": 1, "height": 64, "width": 96}
    wide = picture(size=(80, 90))
    found = pipe("a cat", latents=noise, control_image=wide, controlnet_conditioning_scale=0.7, **settings).images

    pixels = to_tensor(resize_and_crop(wide, (64, 96))[0])[None]
    rows, kept = pipe.encode_captions(["", "a cat"])
    sizes = {"img_hw": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.full((2,), 64 / 96)}
    network = load_controlnet(file, num_heads=4)  # its own base, which is the same here
    timestep = pipe.scheduler.timesteps[0]
    output = network(
        torch.cat([noise, noise]),
        timestep.float().expand(2),
        rows,
        kept,
        control_latents=condition_latents(pipe, pixels).expand(2, -1, -1, -1),
        condition_strength=0.7,
        **(sizes if micro_condition else {}),
    )
    expected = pipe.scheduler.step(guide(output, 4, 4.5, keep_variance=False), timestep, noise).prev_sample
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3)  # products by oneDNN and by MKL


def test_a_picture_does_not_depend_on_its_batch(pipe: PixArtPipeline) -> None:
    settings: dict[str, Any] = {**ARGUMENTS, "seed": [3, 4, 5, 6], "num_images_per_prompt": 2}
    prompts, pictures = ["a cat", "a dog"], [picture(seed) for seed in range(4)]
    each = pipe(prompts, control_image=pictures, **settings).images
    shared = pipe(prompts, control_image=pictures[2], **settings).images
    torch.testing.assert_close(shared[2], each[2], rtol=1e-4, atol=1e-4)
    alone = pipe("a dog", control_image=pictures[3], **{**ARGUMENTS, "seed": 6}).images
    torch.testing.assert_close(alone[0], each[3], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(shared[3], each[3], atol=1e-2)
    unguided = pipe(prompts, control_image=pictures, guidance_scale=1.0, **settings).images
    assert unguided.shape == each.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_draw_the_same_latents_bit_for_bit(
    folder: Path, control_file: Path, hed_file: Path, device: str, dtype: torch.dtype
) -> None:
    parts: dict[str, Any] = {"controlnet": control_file, "edge_detector": hed_file, "torch_dtype": dtype}
    drawn = [load_quietly(folder, device=device, **parts)("a cat", control_image=picture(), **ARGUMENTS).images.cpu()]
    for name in ("full", "4gb"):
        pipe = load_quietly(folder, **parts)
        pipe.set_memory_plan(name, device)
        drawn += [pipe("a cat", control_image=picture(), **ARGUMENTS).images.cpu() for _ in range(2)]
    assert all(torch.equal(latents, drawn[0]) for latents in drawn)


def test_the_control_blocks_visit_with_the_base(
    folder: Path, control_file: Path, hed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_quietly(folder, controlnet=control_file, edge_detector=hed_file)
    pipe.set_memory_plan("4gb", "cpu")
    residency = pipe._residency
    assert residency is not None
    assert residency._visitors["transformer"]._module is pipe.controlnet
    bring, presence = residency.bring, []

    def watched(part: str) -> None:
        bring(part)
        presence.append(set(residency._present))

    monkeypatch.setattr(residency, "bring", watched)
    pipe("a cat", control_image=picture(), seed=0, num_inference_steps=1)
    assert presence == [{"text_encoder"}, {"edge_detector"}, {"vae"}, {"transformer"}, {"vae"}]


def test_the_expected_peak_counts_the_control_blocks_and_hed(folder: Path, control_file: Path, hed_file: Path) -> None:
    plain = load_quietly(folder)
    pipe = load_quietly(folder, controlnet=control_file, edge_detector=hed_file)
    work, cpu = Workload(SIZE_PX, SIZE_PX), torch.device("cpu")
    assert pipe.controlnet is not None and pipe.edge_detector is not None
    blocks = sum(tensor.nbytes for tensor in pipe.controlnet.controlnet.state_dict().values())
    detector = sum(tensor.nbytes for tensor in pipe.edge_detector.state_dict().values())
    for plan in PLANS.values():
        before, after = plain.expected_peak(plan, cpu, work), pipe.expected_peak(plan, cpu, work)
        beside = {"full": detector}.get(plan.name, 0)
        states = 2 * 2 * 16 * 48 * 4  # two more of the size of the tokens, in float32
        assert after["network"] - before["network"] == pytest.approx(blocks + beside + states, abs=4)
        assert after["decoding"] - before["decoding"] == (blocks + beside if plan.name == "full" else 0)
        assert after["text"] == before["text"] and after["edges"] > detector


def test_the_documented_peaks_are_the_expected_ones() -> None:
    parts = full_size_parts()
    with torch.device("meta"):
        parts.controlnet, parts.edge_detector = ControlPixArt(parts.transformer).bfloat16(), HED()
    work, card = Workload(1024, 1024, num_captions=2), torch.device("cuda")
    found = {name: expected_peak(plan, parts, work, tokens=120, device=card) for name, plan in PLANS.items()}
    in_gb = {name: {stage: f"{peak / 1e9:.1f}" for stage, peak in peaks.items()} for name, peaks in found.items()}
    network = "{}, {} and {} GB under the three plans".format(*(in_gb[name]["network"] for name in PLANS))
    assert in_gb["8gb"]["edges"] == in_gb["4gb"]["edges"]
    edges = f"HED, before it, {in_gb['full']['edges']} GB beside the others and {in_gb['4gb']['edges']} GB alone"
    text = " ".join((ROOT / "docs/inference.md").read_text(encoding="utf-8").split())
    assert network in text and edges in text


def test_it_combines_with_a_picture_to_begin_from(pipe: PixArtPipeline) -> None:
    mask = Image.new("L", (SIZE_PX, SIZE_PX), 0)
    mask.paste(255, (0, 0, SIZE_PX // 2, SIZE_PX))
    arguments: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "image": picture(4), "mask_image": mask}
    drawn = np.asarray(pipe("a cat", control_image=picture(), **arguments).images[0])
    assert np.array_equal(drawn[:, SIZE_PX // 2 :], np.asarray(picture(4))[:, SIZE_PX // 2 :])
    assert not np.array_equal(drawn, np.asarray(pipe("a cat", **arguments).images[0]))


def test_hed_finds_the_edges_of_what_is_drawn(folder: Path, control_file: Path, hed_file: Path) -> None:
    photo = picture(size=(150, 100))
    pixels = to_tensor(resize_and_crop(photo, (64, 48))[0])[None]
    settings: dict[str, Any] = {**ARGUMENTS, "height": 64, "width": 48}
    with_hed = load_quietly(folder, controlnet=control_file, edge_detector=hed_file)
    found = with_hed("a cat", control_image=photo, **settings).images
    edges = detect_edges(random_hed(), pixels)
    pipe = load_quietly(folder, controlnet=control_file)
    assert torch.equal(pipe("a cat", control_image=edges[0], **settings).images, found)
    assert not torch.equal(pipe("a cat", control_image=photo, **settings).images, found)


def test_a_control_net_file_is_a_model_with_its_own_base(tmp_path: Path) -> None:
    base = load_transformer(BUNDLED)
    file = write_control(base, tmp_path / "control.safetensors")
    pipe = load_pipeline(file, BUNDLED)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.controlnet, ControlPixArt) and pipe.controlnet.base_model is pipe.transformer
    assert model_fingerprint(pipe.transformer) == model_fingerprint(base)
    arguments: dict[str, Any] = {**ARGUMENTS, "control_image": picture(size=(256, 256)), "num_inference_steps": 2}
    beside = load_quietly(BUNDLED, controlnet=file)
    expected = beside("red apple", **arguments).images
    pipe.null_caption, pipe.clean_captions = beside.null_caption, beside.clean_captions
    assert torch.equal(pipe("red apple", **arguments).images, expected)
    with pytest.raises(CheckpointError, match="control.safetensors: the model is a ControlNet already; leave one"):
        load_pipeline(file, BUNDLED, controlnet=file)


def test_wrong_files_are_refused(folder: Path, control_file: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"input_size": 16}, r"the base given has input_size=8 instead of 16; give the 128 px model"),
        ({"micro_condition": True}, "the base given has micro_condition=False instead of True"),
    ):
        file = write_control(tiny_transformer(depth=DEPTH, **options), tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            load_quietly(folder, controlnet=file)
    torch.save(tiny_transformer().state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="is a transformer without control blocks; give a ControlNet file"):
        load_quietly(folder, controlnet=tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="gone.pth .*no such file or folder"):
        load_quietly(folder, controlnet=tmp_path / "gone.pth")
    network = load_controlnet(control_file, tiny_transformer(depth=DEPTH))
    parts = load_quietly(folder).components
    with pytest.raises(ValueError, match="controlnet must be built around transformer"):
        PixArtPipeline(**{**parts, "controlnet": network})
    deep = control_state(tiny_transformer(depth=DEPTH), DEPTH)
    torch.save(deep, tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match="deep.pth is no ControlNet of its base: num_blocks=3 must be between"):
        load_controlnet(tmp_path / "deep.pth", num_heads=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale=nan must be a finite number"),
        ({"controlnet_conditioning_scale": -0.5}, "controlnet_conditioning_scale=-0.5 must be a finite number >= 0"),
        ({"control_image": "edges.png"}, "'edges.png' is no picture; give a PIL image or a tensor"),
        ({"control_image": torch.zeros(3, 8, 8)}, r"control_image of shape \(3, 8, 8\) must be \(3, 64, 64\)"),
        ({"control_image": [picture()] * 3}, "control_image has 3 pictures for 1 that are drawn"),
    ],
)
def test_wrong_conditions_are_refused(pipe: PixArtPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        pipe("a cat", **{"control_image": picture(), **arguments}, **ARGUMENTS)


def test_a_condition_needs_a_control_net(pipeline: PixArtPipeline) -> None:
    with pytest.raises(PromptError, match="control_image needs a ControlNet; load the pipeline with controlnet=FILE"):
        pipeline("a cat", control_image=picture(), **ARGUMENTS)


def test_saving_leaves_the_control_net_out_and_says_so(
    pipe: PixArtPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    assert "the ControlNet is not written: diffusers has none for PixArt" in caplog.text
    again = load_quietly(tmp_path / "saved")
    assert again.controlnet is None
    assert torch.equal(again("a cat", **ARGUMENTS).images, pipe("a cat", **ARGUMENTS).images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_offload_of_diffusers_draws_the_same(folder: Path, control_file: Path, hed_file: Path) -> None:
    parts: dict[str, Any] = {"controlnet": control_file, "edge_detector": hed_file}
    expected = load_quietly(folder, device="cuda", **parts)("a cat", control_image=picture(), **ARGUMENTS).images
    pipe = load_quietly(folder, **parts)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(pipe("a cat", control_image=picture(), **ARGUMENTS).images, expected)
    assert pipe.transformer.device.type == pipe.controlnet.controlnet[0].after_proj.weight.device.type == "cpu"


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(monkeypatch, capsys)


def test_the_program_follows_a_picture_and_its_recipe_says_so(
    folder: Path, control_file: Path, hed_file: Path, tmp_path: Path, door: Door
) -> None:
    picture().save(tmp_path / "photo.png")
    out = tmp_path / "out"
    base = ["--model_path", folder, "--prompt", "a cat", "--prompt", "a dog", "--step", 2, "--device", "cpu", "--bs", 2]
    control = ["--controlnet", control_file, "--control_image", tmp_path / "photo.png", "--hed", hed_file]

    def draw(*arguments: object) -> int:
        done = door("scripts/inference.py", *base, "--output", out, *arguments)
        assert done.returncode == 0, done.stderr
        return len(list(out.glob("*.png")))

    assert draw(*control) == 2
    recipe = read_recipe(out / "000-a-cat.png")
    blocks = load_controlnet(control_file, tiny_transformer(depth=DEPTH)).controlnet
    assert recipe["controlnet_fingerprint"] == model_fingerprint(blocks)
    assert recipe["edge_detector_fingerprint"] == model_fingerprint(random_hed())
    assert recipe["controlnet_conditioning_scale"] == 1.0 and len(recipe["control_image"]) == 16
    assert "strength" not in recipe
    assert draw(*control) == 2  # both are there
    assert draw(*control[:4]) == 4  # the picture itself, not its edges
    assert draw(*control, "--condition_strength", 0.5) == 6
    picture(7).save(tmp_path / "photo.png")
    assert draw(*control) == 8
    assert draw() == 10
    assert "control_image" not in read_recipe(out / "000-a-cat-5.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control_image", "gone.png"], "error: gone.png: no such picture file"),
        (["--control_image", "README.md"], "error: README.md: not a picture in a known format"),
        (["--controlnet", "gone.pth"], "error: --controlnet is given without --control_image"),
        (["--hed"], "error: --hed is given without --control_image"),
        (["--condition_strength", "1"], "error: --condition_strength is given without --control_image"),
        (["--control_image", "PICTURE"], "error: control_image needs a ControlNet; load the pipeline with"),
        (["--control_image", "PICTURE", "--condition_strength", "nan"], "error: controlnet_conditioning_scale=nan"),
        (["--control_image", "PICTURE", "--hed", "gone.pth"], "error: gone.pth: no such file; the HED edge network is"),
        (["--control_image", "PICTURE", "--controlnet", "gone.pth"], "error: gone.pth holds no transformer"),
    ],
)
def test_bad_input_of_the_program_is_one_line(
    arguments: list[str], message: str, pipeline_folder: Path, tmp_path: Path, door: Door
) -> None:
    picture().save(tmp_path / "photo.png")
    given = [str(tmp_path / "photo.png") if part == "PICTURE" else part for part in arguments]
    base = ["--model_path", pipeline_folder, "--prompt", "a cat", "--device", "cpu", "--output", tmp_path / "out"]
    done = door("scripts/inference.py", *base, *given)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_hed_without_a_file_name_is_the_downloaded_one() -> None:
    from diffusion.checkpoints.download import OUTPUT_DIR, target_of
    from diffusion.checkpoints.published import find_published
    from diffusion.config.sampling_cli import sampling_parser

    row = find_published("ControlNetHED.pth")
    assert sampling_parser("").parse_args(["--hed"]).hed == str(target_of(row, row.pattern, OUTPUT_DIR))
    assert isinstance(random_hed(), HED)
