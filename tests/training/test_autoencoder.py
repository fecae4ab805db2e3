"""The autoencoder script: augmentation, losses, latent equalisation, a tiny run end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from diffusion.errors import ConfigError, DataError
from diffusion.training.autoencoder import (
    AutoencoderConfig,
    AutoencoderObjective,
    augment,
    build_autoencoder,
    concept_weights,
    equalize_latents,
    latent_statistics,
    load_pictures,
    progress_share,
    reconstruction_quality,
    train_autoencoder,
)
from diffusion.training.autoencoder_losses import colour_loss, detail_loss, edge_loss, kl_loss

SIDE = 32


def tiny_config(**changes: Any) -> AutoencoderConfig:
    settings = {"channels": (8, 8, 8, 16), "norm_groups": 4, "crop": SIDE, "batch_size": 4, "warmup_steps": 2}
    return AutoencoderConfig(**{**settings, "learning_rate": 5e-3, "steps": 12, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight train and two held-out pictures: one coloured square each on white."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = []
    for number in range(10):
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        colour = (20 * number, 255 - 25 * number, 90 + 10 * number)
        picture.paste(colour, (4, 4 + number, 20, 24))
        picture.save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": str(number), "split": "train" if number < 8 else "heldout"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("run") / "vae"
    return output, train_autoencoder(data, output, tiny_config(steps=40), log_every=1)


def test_training_lowers_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    losses = [entry["loss"] for entry in trained[1]["history"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_folder_loads_in_stock_diffusers_and_scores_the_reported_psnr(
    trained: tuple[Path, dict[str, Any]], data: Path
) -> None:
    output, metrics = trained
    vae = AutoencoderKL.from_pretrained(str(output), torch_dtype=torch.float32)
    pictures = load_pictures(data, "heldout")
    psnr, sharpness = reconstruction_quality(vae, pictures, device="cpu")
    assert psnr == pytest.approx(metrics["psnr_heldout"], abs=1e-3)
    assert sharpness == pytest.approx(metrics["sharpness_heldout"], rel=1e-2)
    assert all(
        parameter.dtype == torch.float16
        for parameter in AutoencoderKL.from_pretrained(str(output), torch_dtype=torch.float16).parameters()
    )
    assert json.loads((output.parent / "vae_metrics.json").read_text())["scaling_factor"] == metrics["scaling_factor"]


def test_scaling_factor_gives_centred_latents_of_unit_scale(trained: tuple[Path, dict[str, Any]], data: Path) -> None:
    vae = AutoencoderKL.from_pretrained(str(trained[0]), torch_dtype=torch.float32)
    pixels = load_pictures(data, "train").float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        draws = torch.stack([posterior.sample(torch.Generator().manual_seed(n)) for n in range(50)])
    scaled = draws * vae.config.scaling_factor
    torch.testing.assert_close(scaled.std(dim=(0, 1, 3, 4)), torch.ones(4), atol=0.03, rtol=0)
    torch.testing.assert_close(scaled.mean(dim=(0, 1, 3, 4)), torch.zeros(4), atol=0.03, rtol=0)


def test_equalizing_changes_no_reconstruction(data: Path) -> None:
    torch.manual_seed(3)
    vae = build_autoencoder(tiny_config(), SIDE).eval()
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([2.0, -1.0, 0.5, 3.0])
        vae.quant_conv.weight[:4] *= torch.tensor([0.3, 1.0, 4.0, 9.0])[:, None, None, None]
        pictures = load_pictures(data, "train")
        pixels = pictures.float() / 127.5 - 1
        before = vae.encode(pixels).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std, _ = latent_statistics(vae, pictures, device="cpu")
        assert std.max() / std.min() > 1.5
        factor = equalize_latents(vae, mean, std)
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
        gain = (1 / factor / std).float()[None, :, None, None]
        torch.testing.assert_close(after.std, before.std * gain, atol=1e-5, rtol=1e-4)


def test_same_seed_same_weights_other_seed_others(data: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_autoencoder(data, tmp_path / name / "vae", tiny_config(steps=3), seed=seed)
        weights.append((tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_augmentation_keeps_the_range_the_size_and_sharp_edges() -> None:
    pixels = torch.ones(16, 3, 64, 64)
    pixels[:, :, 20:44, 20:44] = torch.tensor([-1.0, 0.0, 0.5])[None, :, None, None]
    sharp = 0
    for seed in range(12):
        out = augment(pixels, 48, torch.Generator().manual_seed(seed))
        assert out.shape == (16, 3, 48, 48)
        assert out.min() >= -1
        assert out.max() <= 1 + 1e-6
        nearest = torch.stack([(out - level).abs() for level in (-1.0, 0.0, 0.5, 1.0)]).amin(0)
        sharp += bool((nearest < 1e-3).all())
    assert sharp >= 3, "about half of the batches are not zoomed and must not be blurred"
    first, again = (augment(pixels, 48, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)


def test_edge_loss_sees_blur_and_ignores_an_offset() -> None:
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(step, 3, 1, 1, count_include_pad=False)
    assert edge_loss(step + 0.3, step) == pytest.approx(0, abs=1e-6)
    assert edge_loss(blurred, step) > 0.01


def test_detail_loss_asks_for_amplitude_and_not_for_phase() -> None:
    fine = torch.cos(torch.pi * torch.arange(64.0)).expand(1, 3, 64, 64) * 0.2  # half a cycle a pixel
    assert detail_loss(-fine, fine) == pytest.approx(0, abs=1e-6)
    assert detail_loss(0.5 * fine, fine) == pytest.approx(math.log(2), rel=0.01)
    assert detail_loss(fine + 0.5, fine) == pytest.approx(0, abs=1e-5)
    flat = torch.zeros_like(fine)
    assert detail_loss(flat + 0.001 * fine, flat) < 0.01, "what an 8-bit picture cannot show must not count"
    assert detail_loss(flat, fine) > 2


def test_detail_may_lie_anywhere_in_its_window() -> None:
    fine = torch.zeros(1, 3, 64, 64)
    fine[..., :32] = torch.cos(torch.pi * torch.arange(32.0)) * 0.2
    assert detail_loss(fine.flip(3), fine) == pytest.approx(0, abs=1e-4)


def test_colour_loss_minds_one_wrong_object_more_than_small_errors_everywhere() -> None:
    right = torch.zeros(1, 3, 64, 64)
    wrong = right.clone()
    wrong[..., :16, :16] = 0.8  # a sixteenth of the picture
    assert (wrong - right).abs().mean() == pytest.approx(0.05)
    assert colour_loss(wrong, right) > 10 * colour_loss(right + 0.05, right)
    texture = torch.cos(torch.pi * torch.arange(64.0)).expand_as(right)
    assert colour_loss(texture, right) == pytest.approx(0, abs=1e-10)


def test_decoder_alone_keeps_the_latents(trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    config = tiny_config(steps=5, detail_weight=0.5)
    metrics = train_autoencoder(data, tmp_path / "vae", config, start=trained[0], decoder_only=True)
    before, after = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (trained[0], tmp_path / "vae")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in changed)
    assert metrics["scaling_factor"] == trained[1]["scaling_factor"]
    with pytest.raises(ConfigError, match="needs a start"):
        train_autoencoder(data, tmp_path / "x", config, decoder_only=True)


def test_disturbance_is_in_units_of_the_latents_std(trained: tuple[Path, dict[str, Any]]) -> None:
    objective = AutoencoderObjective(AutoencoderKL.from_pretrained(trained[0], torch_dtype=torch.float32))
    seen: list[torch.Tensor] = []
    objective.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels, noise = torch.rand(16, 3, SIDE, SIDE) * 2 - 1, torch.randn(16, 4, SIDE // 8, SIDE // 8)
    levels = torch.tensor([0.0, 0.5] * 8).view(-1, 1, 1, 1)
    with torch.no_grad():
        _, mean, log_variance = objective(pixels, noise, levels)
    added = seen[0] - mean
    torch.testing.assert_close(added[::2], (noise * (0.5 * log_variance).exp())[::2])
    excess = added[1::2].square() / noise[1::2].square() - log_variance[1::2].exp()
    torch.testing.assert_close(excess, (0.5 * mean.std()).square().expand_as(excess), rtol=1e-3, atol=1e-4)


def test_the_decoder_is_trained_on_disturbed_latents(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    losses = []
    for level in (0.0, 3.0):
        config = tiny_config(steps=1, latent_noise=level)
        folder = tmp_path / str(level) / "vae"
        metrics = train_autoencoder(data, folder, config, start=trained[0], decoder_only=True)
        losses.append(metrics["history"][0]["pixel"])
    assert losses[1] != losses[0]


def test_kl_loss_is_the_closed_form() -> None:
    mean, log_variance = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_loss(mean, log_variance), expected)


def test_progress_follows_steps_or_seconds() -> None:
    assert progress_share(3, 999.0, tiny_config(steps=12)) == 0.25
    assert progress_share(3, 5.0, tiny_config(steps=None, seconds=20.0)) == 0.25


def test_default_network_is_within_its_budget() -> None:
    vae = build_autoencoder(AutoencoderConfig(steps=1), 256)
    assert sum(parameter.numel() for parameter in vae.parameters()) <= 7_000_000
    assert (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)) == (4, 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"channels": (8, 10)}, "10"),
        ({"crop": 20}, "crop=20"),
        ({"seconds": 3.0}, "seconds"),
        ({"steps": None}, "steps"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_config(**changes)


def test_concepts_are_drawn_equally_often(tmp_path: Path) -> None:
    concepts = ["hand", "hand", "hand", "frog", None]
    rows = [{"file_name": f"{n}.png", "split": "train", "concept": name} for n, name in enumerate(concepts)]
    rows.append({"file_name": "h.png", "split": "heldout", "concept": "frog"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    weights = concept_weights(tmp_path, "train")
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0]))
    assert len(concept_weights(tmp_path, "train", limit=2)) == 2


def test_bad_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        load_pictures(tmp_path, "train")
    with pytest.raises(DataError, match="'test'"):
        load_pictures(data, "test")
    with pytest.raises(DataError, match="64 px"):
        train_autoencoder(data, tmp_path / "vae", tiny_config(crop=64))
