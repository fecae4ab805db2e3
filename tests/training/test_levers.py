"""Levers of training: what each changes, that it learns, and that nothing changes without it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from torch import Tensor

from diffusion.checkpoints import load_transformer, open_checkpoint
from diffusion.config import load_config
from diffusion.data import SampleKey, collate
from diffusion.errors import CheckpointError, ConfigError, DataError, PromptError
from diffusion.features import FeatureStore
from diffusion.features.alignment import AlignmentFeatures, extract_alignment
from diffusion.images.picture_encoder import load_picture_encoder
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.models.routing import TokenRoute, kept_tokens
from diffusion.objectives import prediction_mse, sample_posterior, variance_bound
from diffusion.objectives.levers import watch_blocks
from diffusion.process import keyed_normal, keyed_timesteps, keyed_uniform
from diffusion.training import build_network, denoising_objective
from diffusion.training.building import build_training_data
from tests.programs import run_program
from tests.training.tiny_run import curve, run, weights

SMALL = ["hidden_size=48", "depth=4", "num_heads=2", "save_model_steps=100"]
FLOW = ["process.prediction_type=flow", "pred_sigma=False"]
COMPRESSED = ["kv_compress=True", "kv_compress_config.sampling=conv", "kv_compress_config.scale_factor=2"]
COMPRESSED += ["kv_compress_config.kv_compress_layer=[2]"]
VELOCITY = ["process.prediction_type=v_prediction", "pred_sigma=False"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT of transformers with random weights: patches of 4 px, width 12."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    folder = tmp_path_factory.mktemp("encoder")
    ViTModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def features(encoder: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alignment")
    extract_alignment(FeatureStore(parts / "store"), encoder, parts / "pipe", folder)
    return folder


def mean_of(losses: dict[int, float], first: int, last: int) -> float:
    return float(np.mean([loss for step, loss in losses.items() if first <= step <= last]))


def test_without_levers_the_loss_is_what_it_was(config_file: Path) -> None:
    """Against the formulas written out here, bit for bit."""
    config = load_config(config_file, SMALL)
    torch.manual_seed(0)
    network = build_network(config)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    dataset = build_training_data(config)
    batch = collate([dataset[SampleKey(index, 10 + index)] for index in range(4)])
    objective = denoising_objective(config, dataset)
    found = objective.loss(network, batch, seed=3).loss

    numbers, shape = batch.sample_numbers, batch.latents_mean.shape[1:]
    posterior = keyed_normal(3, "posterior", numbers, shape)
    latents = sample_posterior(batch.latents_mean, batch.latents_std, posterior) * config.scale_factor
    times, noise = keyed_timesteps(3, numbers, 1000), keyed_normal(3, "noise", numbers, shape)
    drop = keyed_uniform(3, "caption_drop", numbers) < config.class_dropout_prob
    embeds, mask = objective.drop_captions(network, batch, drop)
    noisy = objective.process.q_sample(latents, times, noise)
    output = network(noisy, times.float(), embeds, mask)
    mse = prediction_mse(output[:, :4], noise, objective.process.snr(times))
    bound = variance_bound(objective.process, output[:, :4], output[:, 4:], latents, noisy, times)
    assert torch.equal(found, (mse + bound).mean())


# ---- what is predicted ----


@pytest.mark.parametrize("options", [FLOW, VELOCITY, [*VELOCITY, "process.min_snr_gamma=5.0"], ["pred_sigma=False"]])
def test_every_prediction_learns_and_resumes(options: list[str], config_file: Path, tmp_path: Path) -> None:
    options = [*SMALL, *options, "ema_rate=None", "optimizer.lr=3e-3"]
    whole = run(load_config(config_file, [*options, "max_steps=40"]), tmp_path / "whole")
    losses = curve(tmp_path / "whole")
    assert mean_of(losses, 31, 40) < 0.9 * mean_of(losses, 1, 10)
    run(load_config(config_file, [*options, "max_steps=20"]), tmp_path / "cut")
    resumed = run(load_config(config_file, [*options, "max_steps=40"]), tmp_path / "cut", resume_from="latest")
    expected = whole.state.network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state.network.state_dict().items())


def test_targets_are_what_the_papers_say(config_file: Path) -> None:
    """A network that gives the target has no loss; one that gives zero has the target's mean square."""
    latents, noise = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    config = load_config(config_file, [*SMALL, *FLOW, "process.flow_shift=3.0"])
    dataset = build_training_data(config)
    flow = denoising_objective(config, dataset)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    seen: list[Tensor] = []

    def straight(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend([x_t, t])
        return noise - latents

    assert flow.terms(straight, latents, sigma, noise).loss == 0
    torch.testing.assert_close(seen[0], latents + sigma.view(3, 1, 1, 1) * (noise - latents))
    assert torch.equal(seen[1], 1000 * sigma)
    numbers = torch.arange(20000)
    drawn = flow.draw_timesteps(0, numbers)
    u = keyed_uniform(0, "timestep", numbers)
    torch.testing.assert_close(drawn, 3 * u / (1 + 2 * u))  # shift 3
    assert drawn.mean() > 0.6

    velocity = denoising_objective(load_config(config_file, [*SMALL, *VELOCITY]), dataset)
    times = torch.tensor([0, 400, 999])
    abar = velocity.process.alphas_cumprod[times].float().view(3, 1, 1, 1)
    target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    assert velocity.terms(lambda x, t: target, latents, times, noise).loss < 1e-10
    zero = velocity.terms(lambda x, t: torch.zeros_like(x), latents, times, noise).loss
    torch.testing.assert_close(zero, target.square().mean())


@pytest.mark.parametrize("options", [FLOW, VELOCITY])
def test_a_checkpoint_says_what_it_predicts(options: list[str], config_file: Path, parts: Path, tmp_path: Path) -> None:
    kind = options[0].split("=")[1]
    shift = ["process.flow_shift=2.5"] if kind == "flow" else []
    grid = ["validation.prompts=['red apple']", "validation.every_steps=3"]
    run(load_config(config_file, [*SMALL, *options, *shift, *grid, "max_steps=3"]), tmp_path / "run")
    assert (tmp_path / "run/validation/step_0000003.png").is_file()
    checkpoint = tmp_path / "run/checkpoints/checkpoint-3"
    found = open_checkpoint(checkpoint).found
    assert found.config.prediction_type == kind
    assert f"predicts {kind}" in found.describe()
    with pytest.raises(CheckpointError, match=f"predicts {kind}, this run epsilon; set process.prediction_type"):
        build_network(load_config(config_file, [*SMALL, "pred_sigma=False"]), checkpoint)
    with pytest.raises(CheckpointError, match=f"predicts {kind}, this run epsilon"):
        run(
            load_config(config_file, [*SMALL, "pred_sigma=False"]),
            tmp_path / "run",
            resume_from="latest",
            allow_config_change=True,
        )

    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipe")
    again = PixArtPipeline.from_pretrained(tmp_path / "pipe")
    stock = PixArtAlphaPipeline.from_pretrained(str(tmp_path / "pipe"))
    for each in (again, stock):
        each.set_progress_bar_config(disable=True)
        if kind == "flow":
            assert each.scheduler.config.use_flow_sigmas and each.scheduler.config.flow_shift == 2.5
        else:
            assert each.scheduler.config.prediction_type == "v_prediction"
    mine = pipeline("a red apple", num_inference_steps=4, seed=5).images[0]
    options_of_stock = {"clean_caption": False, "use_resolution_binning": False, "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(5)
    theirs = stock("a red apple", num_inference_steps=4, generator=generator, **options_of_stock).images[0]
    assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 2
    assert np.array_equal(np.asarray(mine), np.asarray(again("a red apple", num_inference_steps=4, seed=5).images[0]))
    pipeline.scheduler = make_scheduler("dpm-solver")
    with pytest.raises(PromptError, match=f"the transformer predicts {kind}, the scheduler is for epsilon"):
        pipeline("a red apple")


# ---- token routing ----


def test_routed_tokens_wait_and_come_back() -> None:
    tokens = torch.arange(12.0).view(1, 6, 2)
    route = TokenRoute(torch.tensor([[1, 4]]), first=2, last=3)
    assert torch.equal(route(0, tokens), tokens)
    inside = route(2, tokens)
    assert torch.equal(inside, tokens[:, [1, 4]])
    assert torch.equal(route(3, inside), inside)
    back = route(4, inside + 100)
    assert torch.equal(back[:, [1, 4]], tokens[:, [1, 4]] + 100)
    assert torch.equal(back[:, [0, 2, 3, 5]], tokens[:, [0, 2, 3, 5]])
    assert [route.is_partial(index) for index in range(6)] == [False, False, False, True, True, False]


def test_which_tokens_stay_depends_on_the_sample_alone() -> None:
    scores = keyed_uniform(0, "route", torch.arange(64), (16,))
    kept = kept_tokens(scores, 0.5)
    assert kept.shape == (64, 8)
    assert torch.equal(kept[10:12], kept_tokens(keyed_uniform(0, "route", torch.tensor([10, 11]), (16,)), 0.5))
    counts = torch.bincount(kept.flatten(), minlength=16)
    assert counts.min() > 20 and counts.max() < 44  # 32 expected
    assert kept_tokens(torch.rand(1, 3), 0.9).shape == (1, 1)


def test_tread_trains_the_same_weights_and_is_gone_in_validation(config_file: Path, tmp_path: Path) -> None:
    options = [*SMALL, "max_steps=40", "optimizer.lr=3e-3", "tread.first_block=1", "tread.until_step=30"]
    sizes: list[int] = []
    config = load_config(config_file, [*options, "validation.every_steps=40"])
    trainer = run(config, tmp_path / "run")
    losses = curve(tmp_path / "run")
    assert mean_of(losses, 31, 40) < 0.9 * mean_of(losses, 1, 10)
    network = trainer.state.network
    network.blocks[1].register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
    dataset = build_training_data(config)
    objective = denoising_objective(config, dataset)
    for first, tokens in ((0, 2), (29 * 4, 2), (30 * 4, 4)):  # 2 x 2 tokens, half of them pass around
        batch = collate([dataset[SampleKey(index, first + index)] for index in range(4)])
        objective.loss(network, batch.to(trainer.ranks.device), seed=0)
        assert sizes.pop() == tokens
    assert watch_blocks(network, batch.to(trainer.ranks.device), 0, None, None) is None
    saved = load_transformer(tmp_path / "run/checkpoints/checkpoint-40", ema=True)
    assert curve(tmp_path / "run", "validation_loss")[40] == pytest.approx(
        float(trainer.reports.validation_loss(saved.to(trainer.ranks.device))), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tread.first_block=3"], r"tread: blocks 3..2 of 4"),
        (["tread.first_block=0", "tread.last_block=3"], r"end before the last block \(3\)"),
        (
            ["tread.first_block=1", *COMPRESSED],
            "tread routes around block 2, which compresses keys",
        ),
    ],
)
def test_spans_that_cannot_be(options: list[str], message: str, config_file: Path) -> None:
    config = load_config(config_file, [*SMALL, *options])
    with pytest.raises(ConfigError, match=message):
        denoising_objective(config, build_training_data(config))


# ---- alignment ----


def test_features_lie_where_their_patches_are(features: Path, encoder: Path, parts: Path) -> None:
    from diffusion.images import decode_latents, load_vae

    store, made = FeatureStore(parts / "store"), AlignmentFeatures(features)
    assert (len(made), made.channels) == (len(store), 12)
    vae, model = load_vae(parts / "pipe"), load_picture_encoder(encoder)
    for row in (0, len(store) - 1):
        pixels = decode_latents(vae, store.latents(row)[0].float()[None] * vae.config.scaling_factor)
        small = torch.nn.functional.interpolate(
            (pixels / 2 + 0.5).clamp(0, 1), size=(8, 8), mode="bicubic", antialias=True
        ).clamp(0, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        inputs = (small - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        with torch.no_grad():
            expected = model.model(pixel_values=inputs).last_hidden_state[0, 1:]  # without the class token
        torch.testing.assert_close(made[row].float(), expected, atol=5e-3, rtol=5e-3)
    assert torch.equal(pickle.loads(pickle.dumps(made))[3], made[3])  # noqa: S301 (its own bytes, as a loader does)


def test_encoders_of_timm_open_too(tmp_path: Path) -> None:
    import json

    import timm
    from safetensors.torch import save_file

    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **arguments)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": arguments}))
    opened = load_picture_encoder(tmp_path)
    assert opened(torch.zeros(2, 3, 32, 48), (2, 3)).shape == (2, 6, 12)
    with pytest.raises(CheckpointError, match="is no encoder folder"):
        load_picture_encoder(tmp_path / "nowhere")


def test_alignment_rises_and_its_head_is_kept_apart(features: Path, config_file: Path, tmp_path: Path) -> None:
    repa = [f"repa.features={str(features)!r}", "repa.block=2", "repa.head_width=24", "repa.weight=1.0"]
    options = [*SMALL, *repa, "optimizer.lr=3e-3"]
    whole = run(load_config(config_file, [*options, "max_steps=30", "save_model_steps=15"]), tmp_path / "whole")
    config = load_config(config_file, options)
    dataset = build_training_data(config)
    objective = denoising_objective(config, dataset)
    batch = collate([dataset[SampleKey(index, index)] for index in range(8)]).to(whole.ranks.device)
    torch.manual_seed(43)
    before = objective.loss(build_network(config).to(whole.ranks.device), batch, 0).metrics["alignment"].mean()
    after = objective.loss(whole.state.network, batch, 0).metrics["alignment"].mean()
    assert after < 0.8 * before

    run(load_config(config_file, [*options, "max_steps=15"]), tmp_path / "cut")
    resumed = run(load_config(config_file, [*options, "max_steps=30"]), tmp_path / "cut", resume_from="latest")
    expected = whole.state.network.state_dict()
    assert any(key.startswith("alignment_head.") for key in expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.state.network.state_dict().items())

    checkpoint = tmp_path / "whole/checkpoints/checkpoint-30"
    assert not any("alignment" in key for key in weights(tmp_path / "whole", 30))
    assert not hasattr(load_transformer(checkpoint), "alignment_head")
    plain = build_network(load_config(config_file, SMALL), checkpoint)  # a stage without it starts from it
    again = build_network(config, tmp_path / "whole/checkpoints/checkpoint-30/transformer_ema")
    assert not hasattr(plain, "alignment_head")
    assert torch.equal(plain.state_dict()["t_block.1.bias"], expected["t_block.1.bias"].cpu())
    assert hasattr(again, "alignment_head")


def test_alignment_ends_at_its_step_and_goes_with_routing(features: Path, config_file: Path, tmp_path: Path) -> None:
    repa = [f"repa.features={str(features)!r}", "repa.block=2", "repa.head_width=24", "repa.until_step=3"]
    options = [*SMALL, *repa, "tread.first_block=1", "optimizer.weight_decay=0.0", "save_model_steps=3"]
    trainer = run(load_config(config_file, [*options, "max_steps=6"]), tmp_path / "run")
    assert trainer.objective.alignment.until_number == 12  # 3 steps of 4 samples
    dataset = build_training_data(trainer.config)
    for first, aligned in ((8, True), (12, False)):
        batch = collate([dataset[SampleKey(index, first + index)] for index in range(4)])
        metrics = trainer.objective.loss(trainer.state.network, batch.to(trainer.ranks.device), 0).metrics
        assert ("alignment" in metrics) == aligned


def test_features_of_another_store_are_refused(features: Path, config_file: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(features, tmp_path / "other")
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    (tmp_path / "other/manifest.json").write_text(json.dumps({**manifest, "rows_hash": "0"}))
    with pytest.raises(DataError, match="was made of other pictures than"):
        build_training_data(load_config(config_file, [f"repa.features={str(tmp_path / 'other')!r}"]))
    with pytest.raises(DataError, match="holds no alignment features"):
        build_training_data(load_config(config_file, [f"repa.features={str(tmp_path / 'none')!r}"]))
    config = load_config(config_file, [*SMALL, f"repa.features={str(features)!r}", "repa.block=4"])
    dataset = build_training_data(config)
    with pytest.raises(ConfigError, match="repa.block=4 must be below the network's 4 blocks"):
        denoising_objective(config, dataset)


@pytest.mark.slow
def test_levers_are_the_same_on_two_processes(features: Path, config_file: Path, tmp_path: Path) -> None:
    """Routing and alignment under DDP, and after the head's end, when its weights get no gradient of the loss."""
    repa = [f"repa.features={str(features)!r}", "repa.block=2", "repa.head_width=24", "repa.until_step=2"]
    options = [*SMALL, *repa, "tread.first_block=1", "tread.until_step=3", "max_steps=4"]
    run(load_config(config_file, options), tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["train_scripts/train.py", str(config_file), "--work-dir", str(tmp_path / "two"), "--report_to", "none"]
    done = run_program([*launch, *program, "--cfg-options", *options, "train_batch_size=2"])
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert set(one) == set(two) == {1, 2, 3, 4}
    assert all(two[step] == pytest.approx(loss, rel=1e-4) for step, loss in one.items())
