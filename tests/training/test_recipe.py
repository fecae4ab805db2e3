"""The paper's stages, one after the other, at a tiny size: classes, captions, more pixels, size conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.checkpoints import load_dit, load_transformer
from diffusion.config import load_config
from diffusion.data import SampleKey, StoreDataset
from diffusion.data.classes import give_classes
from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.models import DiT, PixArt
from diffusion.training import build_network
from diffusion.training.building import build_training_data
from diffusion.training.dit_start import make_pixart
from tests.training.tiny_run import ROOT, curve, run

SIZE = ["hidden_size=48", "depth=3", "num_heads=2"]
CLASSES = ["model=DiT_Ti_2", "data.class_by=concept", "num_classes=40", *SIZE]
MINIATURE = sorted((ROOT / "configs/emoji/recipe").glob("stage*.py"))
RECIPE = sorted((ROOT / "configs/pixart_config/recipe").glob("stage*.py"))


@pytest.fixture(scope="module")
def first_stage(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.tiny_run import write_config

    folder = tmp_path_factory.mktemp("first_stage")
    config = load_config(write_config(folder / "config.py", parts), [*CLASSES, "max_steps=30", "optimizer.lr=5e-3"])
    run(config, folder / "run")
    return folder / "run"


def test_a_class_conditional_network_learns_and_resumes(first_stage: Path, config_file: Path, tmp_path: Path) -> None:
    losses = list(curve(first_stage).values())
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    options = [*CLASSES, "optimizer.lr=5e-3", "validation.every_steps=10"]
    run(load_config(config_file, [*options, "max_steps=15"]), tmp_path / "cut")
    resumed = run(load_config(config_file, [*options, "max_steps=30"]), tmp_path / "cut", resume_from="latest")
    expected = load_dit(first_stage / "checkpoints/checkpoint-30").state_dict()
    found = resumed.state.network.state_dict()
    assert all(torch.equal(found[key].cpu(), tensor) for key, tensor in expected.items())
    assert np.isfinite(curve(tmp_path / "cut", "validation_loss")[30])


def test_classes_are_the_concepts_in_alphabetical_order(config_file: Path, parts: Path) -> None:
    dataset = build_training_data(load_config(config_file, CLASSES))
    names = sorted(set(dataset.store.attribute("concept")))
    for index in range(len(dataset)):
        assert names[dataset[SampleKey(index, 0)].class_id] == dataset.attribute("concept")[index]
    held_out = StoreDataset(parts / "store")
    assert give_classes([held_out], "concept") == len(names)  # both splits have the same numbers
    with pytest.raises(DataError, match=r"has class \d+, the network has num_classes=3; set it to \d+ or more"):
        build_training_data(load_config(config_file, [*CLASSES, "num_classes=3"]))


def test_numbers_are_classes_themselves(parts: Path) -> None:
    dataset = StoreDataset(parts / "store")
    dataset.store.attribute = lambda name: [str(7 * (row % 3)) for row in range(len(dataset))]  # type: ignore[method-assign]
    assert give_classes([dataset], "class_id") == 15
    assert [dataset[SampleKey(row, 0)].class_id for row in range(4)] == [0, 7, 14, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.class_by=None"], "must name the attribute that is the class"),
        (["validation.prompts=['a cat']"], "validation.prompts.* is not offered for a class-conditional network"),
        (["process.prediction_type=flow", "pred_sigma=False"], "prediction_type.* is not offered for a class-cond"),
        (["tread.share=0.5"], "tread.* is not offered for a class-conditional network"),
        (["model=PixArt_Ti_2"], "data.class_by.* is read by class-conditional networks"),
        (["model=PixArt_Ti_2", "data.class_by=None"], "num_classes=40 is read by class-conditional networks"),
    ],
)
def test_configs_of_classes_that_cannot_be(options: list[str], message: str, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [*CLASSES, *options])


def test_captions_start_from_classes(first_stage: Path, config_file: Path, tmp_path: Path) -> None:
    """`load_from` of the second stage: a run's folder or a public kind of file; the first prediction is the DiT's."""
    checkpoint = first_stage / "checkpoints/checkpoint-30"
    dit = load_dit(checkpoint)
    torch.save(dit.state_dict(), tmp_path / "DiT.pt")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    captions, times = torch.randn(2, 3, 32), torch.full((2,), 500.0)
    with torch.no_grad():
        expected = dit(latents, times, torch.full((2,), dit.null_class))
        for source in (checkpoint, tmp_path / "DiT.pt"):
            network = build_network(load_config(config_file, SIZE), source)
            assert type(network) is PixArt
            torch.testing.assert_close(network(latents, times, captions), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1
    with pytest.raises(CheckpointError, match=r"cannot start this run: the network has depth=2 \(DiT 3\)"):
        build_network(load_config(config_file, [*SIZE, "depth=2"]), checkpoint)
    run(load_config(config_file, [*SIZE, "max_steps=2"]), tmp_path / "run", load_from=str(checkpoint))
    with pytest.raises(CheckpointError, match="is a PixArt; a class-conditional DiT_Ti_2 starts from a DiT"):
        build_network(load_config(config_file, CLASSES), tmp_path / "run/checkpoints/checkpoint-2")
    assert type(build_network(load_config(config_file, CLASSES), checkpoint)) is DiT


def test_velocities_stay_velocities(config_file: Path, tmp_path: Path) -> None:
    """What a DiT predicts is in its folder; a run of another kind refuses it, from either side."""
    velocity = "process.prediction_type=v_prediction"
    run(load_config(config_file, [*CLASSES, velocity, "max_steps=2"]), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    assert load_dit(checkpoint).config.prediction_type == "v_prediction"
    network = build_network(load_config(config_file, [*SIZE, velocity]), checkpoint)
    assert network.config.prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match=r"the network has prediction_type=epsilon \(DiT v_prediction\); make"):
        build_network(load_config(config_file, SIZE), checkpoint)
    with pytest.raises(CheckpointError, match="predicts v_prediction, this run epsilon"):
        build_network(load_config(config_file, CLASSES), checkpoint)
    make_pixart(checkpoint, tmp_path / "made", caption_channels=32)
    assert load_transformer(tmp_path / "made").config.prediction_type == "v_prediction"


def test_the_tool_writes_what_it_proves(first_stage: Path, tmp_path: Path) -> None:
    made = make_pixart(first_stage / "checkpoints/checkpoint-30", tmp_path / "made", class_id=3, caption_channels=32)
    assert made.difference < 1e-5 * max(1.0, made.size)
    assert "at t = 500 and class 3 it differs from the DiT by at most" in made.describe()
    dit, model = load_dit(first_stage / "checkpoints/checkpoint-30"), load_transformer(tmp_path / "made")
    latents, times = torch.randn(1, 4, 4, 4), torch.full((1,), 500.0)
    with torch.no_grad():
        expected, found = dit(latents, times, torch.tensor([3])), model(latents, times, torch.randn(1, 2, 32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="class_id=41 must be between 0 and 40"):
        make_pixart(first_stage / "checkpoints/checkpoint-30", tmp_path / "other", class_id=41, caption_channels=32)


def test_more_pixels_and_size_conditions_start_from_the_stage_before(config_file: Path, tmp_path: Path) -> None:
    """Positions follow the config; size embedders are new, silent and learn; everything else has to fit."""
    run(load_config(config_file, [*SIZE, "max_steps=2", "optimizer.lr=5e-3"]), tmp_path / "run")
    before = tmp_path / "run/checkpoints/checkpoint-2"
    small = load_transformer(before)
    larger = load_config(config_file, [*SIZE, "model=PixArtMS_Ti_2", "image_size=64", "lewei_scale=2.0"])
    sized = load_config(config_file, [*SIZE, "model=PixArtMS_Ti_2", "image_size=64", "micro_condition=True"])
    captions, latents, times = torch.randn(1, 3, 32), torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    sizes = {"img_hw": torch.tensor([[64.0, 48.0]]), "aspect_ratio": torch.tensor([1.33])}
    with torch.no_grad():
        stretched, plain = build_network(larger, before), build_network(sized, before)
        # Scale 2 at twice the side: every other column lies where a column of the smaller model lay.
        torch.testing.assert_close(
            stretched.position_embedding().view(4, 4, -1)[::2, ::2], small.position_embedding().view(2, 2, -1)
        )
        reference = PixArt(**{**vars(small.config), "input_size": 8})
        reference.load_state_dict({**small.state_dict(), "pos_embed": reference.pos_embed})
        assert torch.equal(plain(latents, times, captions, **sizes), reference(latents, times, captions))
    plain.train()(latents, times, captions, **sizes).square().mean().backward()
    assert plain.csize_embedder.mlp[2].weight.grad.abs().max() > 0
    assert not any(parameter.is_meta for parameter in plain.parameters())
    deeper = load_config(config_file, [*SIZE, "depth=4"])
    with pytest.raises(CheckpointError, match=r"does not fit the model; missing: blocks\.3"):
        build_network(deeper, before)


@pytest.mark.parametrize("path", RECIPE, ids=lambda path: path.stem)
def test_stages_chain(path: Path) -> None:
    """Each names the checkpoint folder of the stage before, and builds the paper's network at its size."""
    config = load_config(path, notify=lambda line: None)
    number = int(path.stem.removeprefix("stage")[0])
    sizes = {1: 256, 2: 256, 3: 256, 4: 512, 5: 1024}
    assert config.image_size == sizes[number]
    assert config.lewei_scale == (2.0 if number == 5 else 1.0)
    assert f"stage{number}" in config.work_dir
    if number > 1:
        assert config.load_from is not None and f"stage{number - 1}" in config.load_from
    with torch.device("meta"):
        network = build_network(config)
    assert isinstance(network, DiT if number == 1 else PixArt)
    assert (network.config.hidden_size, network.config.depth, network.config.num_heads) == (1152, 28, 16)
    assert getattr(network.config, "micro_condition", False) == (number == 5)


@pytest.mark.parametrize("name", ["scratch_tiny", "full_24gb", "full_80gb"])
def test_presets_build_their_networks(name: str) -> None:
    config = load_config(ROOT / f"configs/presets/{name}.py", notify=lambda line: None)
    with torch.device("meta"):
        network = build_network(config)
    assert config.image_size == (256 if name == "scratch_tiny" else 512)
    assert network.config.hidden_size == (256 if name == "scratch_tiny" else 1152)
    assert network.checkpoint_every == (1 if name == "full_24gb" else 0)


@pytest.mark.parametrize("path", MINIATURE, ids=lambda path: path.stem)
def test_the_miniature_chains(path: Path) -> None:
    config = load_config(path, notify=lambda line: None)
    number = int(path.stem.removeprefix("stage")[0])
    before = None if number == 1 else load_config(MINIATURE[number - 2], notify=lambda line: None)
    if before is not None:
        assert config.load_from == f"{before.work_dir}/checkpoints/checkpoint-{before.max_steps}"
    assert (config.image_size, config.lewei_scale) == {1: (128, 1.0), 2: (128, 1.0), 3: (256, 2.0)}[number]


def test_there_are_five_stages() -> None:
    assert [path.stem[:6] for path in RECIPE] == [f"stage{number}" for number in range(1, 6)]
