from __future__ import annotations

import contextlib
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import nn
from transformers import T5Config, T5EncoderModel

from diffusion.errors import PromptError
from diffusion.images import decode_image, decode_latents, encode_moments, load_vae, resize_and_crop, to_tensor
from diffusion.inference import memory
from diffusion.inference.memory import PLANS, Residency, Workload, choose_plan, expected_peak, tile_vae
from diffusion.models import build_model
from tests.inference.tiny_pipeline import WholeVisitorInBlocks, load_quietly

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROMPTS = ["a cat", "woman astronaut with medium skin tone", "tree"]
ARGUMENTS: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "output_type": "latent"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_draw_the_same_latents_bit_for_bit(pipeline_folder: Path, device: str, dtype: torch.dtype) -> None:
    drawn = {}
    for name in ("full", "4gb"):
        pipe = load_quietly(pipeline_folder, torch_dtype=dtype)
        assert pipe.set_memory_plan(name, device).name == name
        drawn[name] = [pipe(PROMPTS, **ARGUMENTS).images.cpu() for _ in range(2)]
    without_plan = load_quietly(pipeline_folder, torch_dtype=dtype, device=device)(PROMPTS, **ARGUMENTS).images.cpu()
    for latents in (*drawn["full"], *drawn["4gb"]):
        assert torch.equal(latents, without_plan)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_leave_before_others_come(pipeline_folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[set[str]]] = {}
    for name in PLANS:
        pipe = load_quietly(pipeline_folder)
        pipe.set_memory_plan(name, device)
        residency = pipe._residency
        assert residency is not None
        bring, presence = residency.bring, seen.setdefault(name, [])

        def watched(part: str, bring: Any = bring, residency: Any = residency, presence: Any = presence) -> None:
            bring(part)
            presence.append(set(residency._present))

        monkeypatch.setattr(residency, "bring", watched)
        pipe("a cat", seed=0, num_inference_steps=1)
    alone = [{"text_encoder"}, {"transformer"}, {"vae"}]
    assert seen == {"full": [*alone[:2], {"transformer", "vae"}], "8gb": alone, "4gb": alone}


def test_int8_stays_near_and_is_smaller(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    expected = pipe.encode_captions(PROMPTS)[0]
    before = sum(tensor.nbytes for tensor in pipe.text_encoder.state_dict().values())
    pipe.set_memory_plan("8gb", "cpu")
    embeds = pipe.encode_captions(PROMPTS)[0]
    linears = [module for module in pipe.text_encoder.modules() if type(module).__name__ == "Int8Linear"]
    assert len(linears) == 2 * 7
    assert all(module.weight.dtype == torch.int8 for module in linears)
    assert 0 < ((embeds - expected).norm() / expected.norm()).item() < 0.02
    after = sum(tensor.nbytes for tensor in pipe.text_encoder.state_dict().values())
    assert after < before - 2.5 * sum(module.weight.numel() for module in linears)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_part_may_change_while_it_is_away(device: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WholeVisitor", WholeVisitorInBlocks)
    part, place = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.device(device)
    residency = Residency(PLANS["full"], place, {"transformer": part, "vae": nn.Linear(3, 3), "text_encoder": None})
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    residency.bring("vae")
    residency.bring("transformer")
    end: Any = pytest.raises(ValueError, match="in the middle") if fails else contextlib.nullcontext()
    with end, residency.changing("transformer"):
        assert residency._present == {"vae"} and part[0].weight.device.type == "cpu"
        part[0].weight.data = torch.full((3, 3), 2.0)
        part[1] = nn.Linear(3, 1)
        if fails:
            raise ValueError("in the middle")
    changed = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    assert changed["0.weight"].eq(2).all() and changed["1.weight"].shape == (1, 3)
    for move, where, present in (
        (lambda: residency.bring("transformer"), device, {"transformer", "vae"}),
        (residency.release, "cpu", set()),
    ):
        move()
        assert residency._present == present
        for name, tensor in part.state_dict().items():
            assert tensor.device.type == where and torch.equal(tensor.cpu(), changed[name])
    assert device == "cpu" or torch.cuda.memory_allocated() == held
    residency.forget("transformer")
    assert "transformer" not in residency._parts


def full_size_parts() -> Any:
    """Shapes alone: T5-XXL, XL/2 for 1024 px and the VAE of Stable Diffusion on the meta device."""
    with torch.device("meta"):
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        network = build_model("PixArtMS_XL_2", input_size=128, pe_interpolation=2.0)
    return SimpleNamespace(text_encoder=encoder.bfloat16(), transformer=network.bfloat16(), vae=vae)


def test_expected_peaks_of_the_official_sizes() -> None:
    parts = full_size_parts()
    one, four = Workload(1024, 1024, num_captions=2), Workload(1024, 1024, pictures=4, num_captions=5)

    def peaks(name: str, work: Workload = one) -> dict[str, float]:
        stages = expected_peak(PLANS[name], parts, work, tokens=120, device=CUDA)
        return {stage: num_bytes / 1e9 for stage, num_bytes in stages.items()}

    assert max(peaks("4gb").values()) < 4.0
    assert max(peaks("8gb").values()) < 7.0
    assert 9.5 < max(peaks("full").values()) < 11
    assert max(peaks("full", four).values()) < 11
    # 4.76 B weights of 2 bytes and the context; two blocks of 193 M and the vocabulary; 8 bits.
    assert peaks("full")["text"] == pytest.approx(9.52 + 0.8, abs=0.05)
    assert peaks("4gb")["text"] == pytest.approx(0.77 + 0.26 + 0.8, abs=0.05)
    assert peaks("8gb")["text"] == pytest.approx(4.63 + 0.26 + 0.17 + 0.8, abs=0.05)
    # 0.33 GB of weights; 1024 px whole, and a tile of 768 px.
    assert peaks("8gb")["decoding"] == pytest.approx(4.42 + 0.33 + 0.8, abs=0.05)
    assert peaks("4gb")["decoding"] == pytest.approx(2.49 + 0.33 + 0.8, abs=0.05)


def test_the_expected_peaks_are_those_of_a_card() -> None:
    measured = json.loads((ROOT / "benchmarks/results/memory_plans.json").read_text())["rows"]
    parts = full_size_parts()
    for name, pictures in (("full", 1), ("full x4", 4), ("8gb", 1), ("4gb", 1)):
        work = Workload(1024, 1024, pictures=pictures, num_captions=pictures + 1)
        peaks = expected_peak(PLANS[name.split()[0]], parts, work, tokens=120, device=CUDA)
        taken = measured[name]["peak_allocated_gb"] + measured[name]["context_gb"]
        assert 0.93 * taken < max(peaks.values()) / 1e9 < 1.05 * taken, name


def test_the_documented_peaks_are_the_expected_ones() -> None:
    lines = (ROOT / "docs/inference.md").read_text(encoding="utf-8").splitlines()
    parts = full_size_parts()
    for name, plan in PLANS.items():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |") and " GB" in line]
        written = [float(figure) for figure in re.findall(r"([\d.]+) GB", line)]
        peaks = expected_peak(plan, parts, Workload(1024, 1024, num_captions=2), tokens=120, device=CUDA)
        assert written == [round(peak / 1e9, 1) for peak in peaks.values()]


@pytest.mark.parametrize(("free_gb", "expected"), [(24, "full"), (10, "8gb"), (5, "4gb"), (1, "4gb")])
def test_auto_takes_the_first_plan_that_fits_and_says_so(
    free_gb: float, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free_gb * 1e9))
    peaks = {"full": 10.2e9, "8gb": 5.7e9, "4gb": 2.5e9}
    with caplog.at_level(logging.INFO):
        plan = choose_plan("auto", lambda plan: int(peaks[plan.name]), CUDA)
    assert plan.name == expected
    assert f"memory plan {expected} (T5 " in caplog.text
    assert f"expected peak {peaks[expected] / 1e9:.1f} GB of {free_gb:.1f} GB free on cuda" in caplog.text
    assert ("may not be enough" in caplog.text) is (free_gb == 1)


def test_auto_on_the_cpu_is_full(pipeline_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load_quietly(pipeline_folder)
    with caplog.at_level(logging.INFO):
        assert pipe.set_memory_plan("auto", "cpu").name == "full"
    assert "because memory on cpu is not counted" in caplog.text


def test_wrong_plans_are_refused(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    with pytest.raises(PromptError, match="memory='8g' is unknown; did you mean '8gb'"):
        pipe.set_memory_plan("8g", "cpu")
    pipe.set_memory_plan("4gb", "cpu")
    with pytest.raises(PromptError, match="has memory plan 4gb already"):
        pipe.set_memory_plan("full", "cpu")
    with pytest.raises(PromptError, match="moves its parts by itself"):
        pipe.to("cpu")


def test_a_freed_text_encoder_leaves_embeddings_to_draw_from(pipeline_folder: Path) -> None:
    pipe = load_quietly(pipeline_folder)
    pipe.set_memory_plan("4gb", "cpu")
    expected = pipe("a cat", **ARGUMENTS).images
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    rows, mask = pipe.encode_captions(["a cat", ""])
    captions = dict(zip(names, (rows[:1], mask[:1], rows[1:], mask[1:])))
    pipe.free_text_encoder()
    assert torch.equal(pipe(**captions, **ARGUMENTS).images, expected)
    with pytest.raises(PromptError, match="has no text encoder; give prompt_embeds"):
        pipe("a cat", **ARGUMENTS)


@pytest.mark.slow
def test_tiled_decoding_stays_near_at_1024_px() -> None:
    vae = load_vae(ROOT / "output/pretrained_models/emoji-256")
    files = sorted((ROOT / "data/emoji").rglob("*.webp"))[:800:200]
    pixels = torch.stack([to_tensor(resize_and_crop(decode_image(file), (256, 256))[0]) for file in files])
    mean = encode_moments(vae, pixels)[0] * vae.config.scaling_factor  # (4, 4, 32, 32)
    mosaic = torch.cat([mean.roll(shift, 0) for shift in range(4)])  # encoding 16 pictures would take longer
    latents = rearrange(mosaic, "(rows cols) c h w -> 1 c (rows h) (cols w)", rows=4)  # (1, 4, 128, 128)
    whole = decode_latents(vae, latents).clamp(-1, 1)
    tile_vae(vae, PLANS["4gb"])
    tiled = decode_latents(vae, latents).clamp(-1, 1)
    psnr = 10 * np.log10(4 / (tiled - whole).square().mean().item())
    assert 35 <= psnr < 80  # 80: they would be the same picture, and nothing was tiled
