"""The fast training step: compiled once a bucket, without waiting for the device, with the loss of the plain one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.config import TrainConfig, load_config
from diffusion.data import SampleKey, collate
from diffusion.errors import ConfigError
from diffusion.features import FeatureRow, FeatureStoreWriter
from diffusion.models.kernels import FP8Linear, Kernels
from diffusion.ranks import Ranks
from diffusion.training import Reporting, Trainer, denoising_objective
from diffusion.training.continuity import check_config
from tests.training.tiny_run import curve, run

BUCKETS = ((256, 256), (240, 272), (208, 304))  # height, width of ASPECT_RATIO_256
KERNELS = {"packed": ["kernels.text=packed"], "spare": ["kernels.text=spare", "kernels.head_width=24"]}


@pytest.fixture
def many_sizes(tmp_path: Path) -> TrainConfig:
    """A store of three aspect ratios and captions of 1 to 9 tokens, and the config of a tiny network on it."""
    torch.manual_seed(0)
    writer = FeatureStoreWriter(tmp_path / "store", {}, torch.zeros(1, 16))
    for number in range(18):
        height, width = BUCKETS[number % 3]
        latents = torch.randn(4, height // 8, width // 8)
        caption = torch.randn(1 + number % 9, 16).bfloat16()
        size = (height, width)
        writer.add(FeatureRow(f"{number}", size, size, (0, 0, width, height), latents, latents.abs(), ["c"], [caption]))
    writer.close()
    return TrainConfig.model_validate(
        {
            "data": {"type": "Store", "root": str(tmp_path / "store")},
            "data_root": "/",
            "multi_scale": True,
            "aspect_ratio_type": "ASPECT_RATIO_256",
            "hidden_size": 32,
            "depth": 3,
            "num_heads": 2,
            "caption_channels": 16,
            "model_max_length": 12,
            "null_caption": "t5_empty",
            "train_batch_size": 2,
            "num_workers": 0,
            "mixed_precision": "no",
            "compile": True,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", ["mask", "packed"])
def test_an_epoch_of_many_sizes_compiles_once_a_bucket(text: str, many_sizes: TrainConfig, tmp_path: Path) -> None:
    config = many_sizes.model_copy(update={"kernels": many_sizes.kernels.model_copy(update={"text": text})})
    trainer = build(config, tmp_path)
    # Counted with a compiler that emits no code: how often it is asked does not depend on it.
    trainer.state.network.compile_blocks(dynamic=False, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    shapes = Counter()
    for batch in batches(trainer):
        shapes[batch.latents_mean.shape[2:]] += 1
        trainer.objective.loss(trainer.model, batch, config.seed).loss.backward()
    assert len(shapes) == 3 and shapes.total() == 9
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_a_step_does_not_wait_for_the_device(many_sizes: TrainConfig, tmp_path: Path) -> None:
    config = many_sizes.model_copy(update={"compile": False})
    trainer = build(config, tmp_path)
    trainer._base_lr, trainer._factor, trainer.first_step = 1e-4, lambda step: 1.0, 0
    given = iter(batches(trainer))
    trainer._train_step(given, trainer.window)
    watch = Waits(trainer.ranks.device)
    with watch:
        for _ in range(3):
            trainer._train_step(given, trainer.window)
    assert trainer.state.step == 4
    assert watch.calls > 100
    assert not watch.waits


class Waits(TorchDispatchMode):
    """Counts operators whose result the host must read; on a GPU torch itself refuses them."""

    operators = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls, self.waits, self.on_card = 0, Counter(), device.type == "cuda"  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in self.operators:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Waits:
        if self.on_card:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.on_card:
            torch.cuda.set_sync_debug_mode("default")


def build(config: TrainConfig, folder: Path) -> Trainer:
    ranks = Ranks("cuda" if torch.cuda.is_available() else "cpu")
    return Trainer(config, denoising_objective, folder / "run", reporting=Reporting(tensorboard=False), ranks=ranks)


def batches(trainer: Trainer) -> list[Any]:
    """The batches of the first epoch, on the device."""
    plan = trainer.sampler.plan(0)
    keys = [[SampleKey(index, 0) for index in group] for group in plan]
    return [collate([trainer.dataset[key] for key in group]).to(trainer.ranks.device) for group in keys]


def test_a_config_chooses_the_kernels(config_file: Path, tmp_path: Path) -> None:
    options = ["kernels.text=packed", "kernels.head_width=24", "kernels.fp8=rowwise", "kernels.fp8_layers=['mlp.fc2']"]
    trainer = build(load_config(config_file, [*options, "hidden_size=32", "depth=1", "num_heads=2"]), tmp_path)
    block = trainer.state.network.blocks[0]
    assert block.cross_attn.kernels == block.kernels == Kernels(text="packed", head_width=24)
    assert type(block.mlp.fc2) is FP8Linear
    assert type(block.mlp.fc1) is torch.nn.Linear
    assert any(parameter is block.mlp.fc2.weight for parameter in trainer.state.optimizer.param_groups[0]["params"])


def test_kernels_that_cannot_be_had_are_named(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["kernels.fp8=rowwise", "hidden_size=24", "depth=1", "num_heads=2"])
    with pytest.raises(ConfigError, match=r"kernels: fp8: blocks.0.attn.qkv has 24 x 72 weights, not multiples of 16"):
        build(config, tmp_path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["kernels.fp8_layers=['mlp.fc1']"], "fp8_layers.*has no effect"),
        (["grad_checkpointing=True", "grad_checkpointing_args.policy=budget"], "set compile=True"),
        (
            ["grad_checkpointing=True", "grad_checkpointing_args.budget=0.3"],
            "budget=0.3 is read by policy='budget' only",
        ),
    ],
)
def test_keys_that_do_nothing_are_refused(options: list[str], key: str, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(config_file, options)


def test_a_run_may_change_its_kernels_but_not_its_arithmetic(config_file: Path) -> None:
    saved = load_config(config_file).model_dump(mode="json")
    exact = ["kernels.attention=cudnn", "kernels.text=packed", "kernels.fused=True", "kernels.head_width=80"]
    check_config(saved, load_config(config_file, exact), allow=False)
    for option in ("kernels.fp8=rowwise", "kernels.bf16_stream=True"):
        with pytest.raises(ConfigError, match=option.partition("=")[0]):
            check_config(saved, load_config(config_file, [option]), allow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_two_hundred_steps_have_one_curve(name: str, config_file: Path, tmp_path: Path) -> None:
    """On bundled pictures and one seed; float sums in another order part slowly."""
    common = ["max_steps=200", "hidden_size=32", "depth=2", "num_heads=2", "save_model_steps=None", "log_interval=10"]
    run(load_config(config_file, common), tmp_path / "plain")
    run(load_config(config_file, [*common, *KERNELS[name]]), tmp_path / name)
    plain, ours = curve(tmp_path / "plain"), curve(tmp_path / name)
    assert len(plain) == 20
    assert ours == pytest.approx(plain, rel=2e-3)
    assert plain[200] < plain[10]
