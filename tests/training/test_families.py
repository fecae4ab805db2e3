"""What all families share: a skipped step is replayed, and networks of velocity and flow train to files that open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler
from PIL import Image
from safetensors import safe_open

from diffusion.adapters import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, read_adapter, write_layout
from diffusion.checkpoints import load_controlnet, load_transformer, open_checkpoint, save_transformer
from diffusion.config import TrainConfig, load_config
from diffusion.errors import CheckpointError, ConfigError
from diffusion.inference import PixArtPipeline
from diffusion.inference.solvers import make_one_step_scheduler
from diffusion.models import PixArt
from diffusion.training import Reporting, Trainer, replay_step
from diffusion.training.adapter_family import family_of
from diffusion.training.control import ControlNet
from diffusion.training.distillation import LCM, LCMLoRA
from diffusion.training.family import Family
from diffusion.training.one_step import DMD
from diffusion.training.publishing import publish
from tests.training.tiny_run import curve, weights
from tests.training.upload_hub import TOKEN, running_upload_hub

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2}
KINDS: dict[str, list[str]] = {
    "epsilon": [],
    "v_prediction": ["process.prediction_type=v_prediction"],
    "flow": ["process.prediction_type=flow", "process.flow_shift=2.0", "pred_sigma=False"],
}
OPTIONS: dict[type[Family], list[str]] = {
    LCM: ["ema_decay=0.5"],
    LCMLoRA: ["lora_rank=4"],
    ControlNet: ["copy_blocks_num=1", "control_condition=canny"],
    DMD: [],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each kind."""
    folders = {}
    for kind in KINDS:
        torch.manual_seed(1)
        own = {"prediction_type": kind, "pred_sigma": kind != "flow", "flow_shift": 2.0 if kind == "flow" else 1.0}
        network = PixArt(**SIZES, **own, caption_channels=32, input_size=4)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
        folders[kind] = tmp_path_factory.mktemp(kind)
        save_transformer(network, folders[kind] / "transformer")
    return folders


def configured(config_file: Path, base: Path, kind: str, *options: str) -> TrainConfig:
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    return load_config(config_file, [*sizes, f"load_from={base}", *KINDS[kind], "train_batch_size=2", *options])


def run(config: TrainConfig, family: Family, work_dir: Path, **options: Any) -> Trainer:
    torch.set_num_threads(1)
    quiet = Reporting(tensorboard=False)
    trainer = Trainer(config, family.objective, work_dir, reporting=quiet, family=family, **options)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_a_skipped_step_of_any_family_is_replayed(
    kind: type[Family], config_file: Path, bases: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The replay finds the loss that the step had; LCM's depends on the average too."""
    base = tmp_path / "base"
    shutil.copytree(bases["epsilon"], base)
    config = configured(config_file, base, "epsilon", *OPTIONS[kind], "max_steps=3", "optimizer.lr=1e-2")
    run(config, kind(), tmp_path / "sound")
    monkeypatch.setenv("FAULT", "nan@step=3")
    run(config, kind(), tmp_path / "run")
    replay = tmp_path / "run/replay/step-0000003/replay.json"
    replay_step(replay)
    said = capsys.readouterr().out
    assert float(said.split("together: loss ")[1].split(",")[0]) == pytest.approx(
        curve(tmp_path / "sound")[3], rel=1e-5
    )
    assert "the step is finite here" in said
    other = load_transformer(base)
    other.t_block[1].bias.data += 1
    shutil.rmtree(base)
    save_transformer(other, base / "transformer")
    with pytest.raises(CheckpointError, match=r"fingerprint of (teacher|base) was .* put back the weights"):
        replay_step(replay)


def test_a_consistency_step_sees_the_average_of_the_step_before(
    config_file: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """However often a run logs and saves, for which it waits for the average too."""
    options = [*OPTIONS[LCM], "optimizer.lr=1e-2", "max_steps=4"]
    for name, steps in (("seldom", 4), ("often", 1)):
        cadence = [f"save_model_steps={steps}", f"log_interval={steps}"]
        run(configured(config_file, bases["epsilon"], "epsilon", *options, *cadence), LCM(), tmp_path / name)
    seldom, often = (weights(tmp_path / name, 4) for name in ("seldom", "often"))
    assert all(torch.equal(often[key], tensor) for key, tensor in seldom.items())


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_lcm_of_every_kind_opens_with_the_stock_scheduler(
    kind: str, config_file: Path, bases: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    trainer = run(configured(config_file, bases[kind], kind, *OPTIONS[LCM], "max_steps=2"), LCM(), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    found = open_checkpoint(checkpoint).found
    assert found.lcm and found.config.prediction_type == kind
    scheduler = {"v_prediction": LCMScheduler, "flow": FlowMatchLCMScheduler}[kind].from_pretrained(
        str(checkpoint / "scheduler")
    )
    if kind == "flow":
        assert scheduler.config.shift == 2.0
    else:
        assert scheduler.config.prediction_type == kind
    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=checkpoint, ema=True, algorithm="lcm")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 4)
    settings = {"guidance_scale": 1.0, "seed": 0, "output_type": "latent", "latents": noise, "height": 32, "width": 32}
    drawn = pipeline("a cat", num_inference_steps=1, **settings).images
    # One step is the consistency function of the training.
    embeds, mask = pipeline.encode_captions(["a cat"])
    objective: Any = trainer.objective
    begin, _ = objective.grid.interval(torch.tensor([49]))
    with torch.no_grad():
        output = pipeline.transformer(noise, objective.path.original_timesteps(begin), embeds, mask)[:, :4]
    x0, _ = objective.path.x0_and_noise(output, noise, begin, kind)
    torch.testing.assert_close(drawn, objective.grid.consistency(noise, x0, begin), atol=1e-3, rtol=1e-3)
    assert torch.isfinite(pipeline("a cat", num_inference_steps=4, **settings).images).all()


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_controlnets_dmd_and_adapters_of_every_kind(
    kind: str, config_file: Path, bases: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    run(configured(config_file, bases[kind], kind, *OPTIONS[ControlNet], "max_steps=1"), ControlNet(), tmp_path / "c")
    branch = tmp_path / "c/checkpoints/checkpoint-1"
    assert load_controlnet(branch, load_transformer(bases[kind])).config.prediction_type == kind
    with pytest.raises(CheckpointError, match=f"prediction_type=epsilon instead of {kind}"):
        load_controlnet(branch, load_transformer(bases["epsilon"]))

    config = configured(config_file, bases[kind], kind, "lora.rank=2", "max_steps=1", "ema_rate=None")
    run(config, family_of(config), tmp_path / "lora")
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, COMFYUI_WEIGHTS):
        assert read_adapter(tmp_path / "lora" / name).prediction_type == kind
        with safe_open(tmp_path / "lora" / name, framework="pt") as file:
            assert file.metadata()["modelspec.prediction_type"] == {"v_prediction": "v", "flow": "flow"}[kind]
    again = write_layout(read_adapter(tmp_path / "lora"), tmp_path / "again", "comfyui")
    pipeline = PixArtPipeline.from_pretrained(parts / "pipe", transformer=bases["epsilon"])
    with pytest.raises(CheckpointError, match=f"its base predicts {kind}, this one epsilon"):
        pipeline.load_lora_weights(again)
    card = (tmp_path / "lora/README.md").read_text()
    assert f"| predicts | {kind} |" in card

    config = configured(config_file, bases[kind], kind, "max_steps=1")
    if kind == "flow":
        with pytest.raises(ConfigError, match="'flow' is not offered by DMD"):
            run(config, DMD(), tmp_path / "dmd")
        return
    run(config, DMD(), tmp_path / "dmd")
    one_step = PixArtPipeline.from_pretrained(
        parts / "pipe", transformer=tmp_path / "dmd/checkpoints/checkpoint-1", ema=True
    )
    one_step.set_progress_bar_config(disable=True)
    one_step.scheduler = make_one_step_scheduler(400, kind)
    drawn = one_step("a cat", num_inference_steps=1, guidance_scale=1.0, seed=0, output_type="latent").images
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_card_and_upload_of_every_family(
    kind: type[Family], config_file: Path, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card says what the run made, the upload holds it, and the card's code draws with what was uploaded."""
    options = [*OPTIONS[kind], "max_steps=1", "ema_rate=None"]
    run(configured(config_file, bases["epsilon"], "epsilon", *options), kind(), tmp_path / "made")
    with running_upload_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        publish(tmp_path / "made", "made", token=TOKEN)
        files = hub.files["someone/made"]
    for name, content in files.items():
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)
    folders = {name.split("/")[0] for name in files if "/" in name}
    expected = {LCM: {"transformer", "scheduler"}, LCMLoRA: set(), ControlNet: {"controlnet"}, DMD: {"transformer"}}
    assert folders == expected[kind]
    assert (PEFT_WEIGHTS in files) == (kind is LCMLoRA)
    card = (tmp_path / "hub/README.md").read_text()
    said = {LCM: "distilled from", LCMLoRA: "LCM-LoRA of rank 4", ControlNet: "ControlNet of 1 blocks", DMD: "one step"}
    assert said[kind] in card
    code = card.split("```python\n")[1].split("```")[0]
    for name in ("THIS_REPOSITORY", "THIS_FOLDER"):
        code = code.replace(name, str(tmp_path / "hub"))
    compiled = compile(code, "card", "exec")
    if kind in (ControlNet, DMD):  # the others need a whole stock pipeline, or a base with all parts
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (32, 32), "white").save("edges.png")
        exec(compiled, {})
        assert (tmp_path / "picture.png").is_file()
    for other in (LCM, DMD) if kind in (LCM, DMD) else ():
        config = configured(config_file, tmp_path / "made/checkpoints/checkpoint-1", "epsilon", *OPTIONS[other])
        with pytest.raises(CheckpointError, match="is distilled already; give the model that it was distilled from"):
            run(config, other(), tmp_path / other.__name__)


def test_a_base_of_another_kind_is_refused(config_file: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    for number, kind in enumerate(OPTIONS):
        config = configured(config_file, bases["v_prediction"], "epsilon", *OPTIONS[kind])
        with pytest.raises(
            CheckpointError, match="predicts v_prediction, this run epsilon; set process.prediction_type"
        ):
            run(config, kind(), tmp_path / str(number))
    for option in ("tread.first_block=0", "lora.rank=2"):
        config = configured(config_file, bases["epsilon"], "epsilon", option)
        with pytest.raises(ConfigError, match=f"{option.split('.')[0]} is not offered by this program"):
            run(config, LCM(), tmp_path / option)
    with pytest.raises(ConfigError, match="pred_sigma.*must be False with process.prediction_type='flow'"):
        configured(config_file, bases["flow"], "flow", "pred_sigma=True")


def test_weights_of_a_skipped_step_are_those_before_it(
    config_file: Path, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and target of LCM, as the run without the step ends with them."""
    config = configured(config_file, bases["epsilon"], "epsilon", *OPTIONS[LCM], "optimizer.lr=1e-2", "max_steps=2")
    run(config, LCM(), tmp_path / "sound")
    monkeypatch.setenv("FAULT", "nan@step=3")
    run(config.model_copy(update={"max_steps": 3}), LCM(), tmp_path / "run")
    replay = tmp_path / "run/replay/step-0000003"
    for name in ("transformer", "transformer_ema"):
        kept = open_checkpoint(replay, ema=name.endswith("ema")).state_dict
        expected = open_checkpoint(tmp_path / "sound/checkpoints/checkpoint-2", ema=name.endswith("ema")).state_dict
        assert all(torch.equal(kept[key], tensor) for key, tensor in expected.items())
