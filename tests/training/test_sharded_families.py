"""Teachers, targets, adapters and control branches under FSDP2: as under DDP, resumed exactly, in files that open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from diffusion.adapters import read_adapter, start_lora
from diffusion.checkpoints import load_controlnet, load_transformer, open_checkpoint, save_transformer
from diffusion.config import load_config
from diffusion.models import ControlPixArt, PixArt
from diffusion.objectives import OneStepNetworks
from diffusion.training import replay_step
from diffusion.training.adapter_family import AdapterFamily
from diffusion.training.optimization import WeightAverage
from diffusion.training.parallel import place_frozen, shard
from diffusion.training.sharding import is_sharded, keep_shell, shell_of, whole_copy
from tests.training.test_parallel import optimizer_state, run_workers
from tests.training.tiny_run import curve, write_config

SIZES = {"hidden_size": 32, "depth": 3, "num_heads": 2}
FAMILIES = {
    "LCM": ["ema_decay=0.5"],
    "LCMLoRA": ["lora_rank=4"],
    # The stored null caption is read outside of the forward pass.
    "ControlNet": ["copy_blocks_num=2", "control_condition=canny", "null_caption='stored'", "class_dropout_prob=0.5"],
    "DMD": [],
    "AdapterFamily": ["lora.rank=4", "lora.use_dora=True"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = PixArt(**SIZES, caption_channels=32, input_size=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("base")
    save_transformer(network, folder / "transformer", stored_null_caption=True)
    return folder


@pytest.fixture(scope="module")
def configs(base: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config a family. Where a batch has one sample, the processes cannot share three evenly."""
    folder = tmp_path_factory.mktemp("configs")
    file = write_config(folder / "config.py", parts)
    common = [f"{name}={value}" for name, value in SIZES.items()]
    common += [f"load_from={base}", "max_steps=4", "save_model_steps=2", "gradient_clip=0.5"]
    common += ["validation.every_steps=2", "validation.num_samples=3"]
    # Adam divides by |gradient| + eps: with a small eps the rounding of a gradient near 0 decides where a weight goes.
    common += ["optimizer.eps=1e-5"]
    for name, options in FAMILIES.items():
        (folder / f"{name}.json").write_text(load_config(file, [*common, *options]).to_json())
    return folder


@pytest.fixture(scope="module")
def two(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    root = tmp_path_factory.mktemp("two")
    run_workers(2, configs, root, "families")
    return root


def checkpoint(work_dir: Path) -> Path:
    return work_dir / "checkpoints/checkpoint-4"


def weight_files(work_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every weight file of the last checkpoint, and of the exported adapter."""
    files = [*checkpoint(work_dir).rglob("*.safetensors"), *work_dir.glob("*.safetensors")]
    return {str(file.relative_to(work_dir)): load_file(file) for file in files}


def assert_same_training(work_dir: Path, reference: Path) -> None:
    """Losses, norms, weights, averages and moments, within the reordering of float32 sums.

    What that changes here, by instruction set and data: curves up to 2e-6, moments 2e-5, weights 5e-6 of their norm.
    """
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(work_dir, key) == pytest.approx(curve(reference, key), rel=1e-4), key
    ours, theirs = moments(work_dir), moments(reference)
    largest = max(value.norm().item() for key, value in theirs.items() if key.endswith("exp_avg"))
    # Of an adapter the smallest gradient is 2e-6 of the largest: it shows the rounding of the sums it comes from.
    assert_close(ours, theirs, 1e-3, "moments", floor=2e-7 * largest)
    ours, theirs = weight_files(work_dir), weight_files(reference)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        assert_close(ours[file], tensors, 1e-4, file)


def moments(work_dir: Path) -> dict[str, torch.Tensor]:
    """What Adam remembers of gradients, in their unit, and apart from them counts of steps."""
    state = optimizer_state(work_dir, 4)
    return {key: value.sqrt() if key.endswith("exp_avg_sq") else value for key, value in state.items()}


def assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float, where: str, floor: float = 0.0
) -> None:
    """Each tensor within a share of its norm (and `floor`); weights move by about 4 % of it here (lr 1e-3, four steps,
    std 0.08)."""
    assert ours.keys() == theirs.keys(), where
    for key, tensor in theirs.items():
        difference = (ours[key] - tensor).float().norm().item()
        assert difference <= tolerance * tensor.float().norm().item() + floor, f"{where} {key}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "moved"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shards_train_as_ddp_does(name: str, mode: str, two: Path) -> None:
    """full_shard accumulates two micro-batches and recomputes blocks as well; the other moves from DDP to grad_op."""
    assert curve(two / name / mode).keys() == {1, 2, 3, 4}
    assert_same_training(two / name / mode, two / name / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sharded_run_resumes_bit_for_bit(name: str, two: Path) -> None:
    cut, unbroken = two / name / "cut", two / name / "full"
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(cut, key) == curve(unbroken, key)
    ours, theirs = weight_files(cut), weight_files(unbroken)
    ours["moments"], theirs["moments"] = optimizer_state(cut, 4), optimizer_state(unbroken, 4)
    for file, tensors in theirs.items():
        assert all(torch.equal(ours[file][key], tensor) for key, tensor in tensors.items()), file


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_skipped_step_of_shards_is_replayed(name: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process, with the loss that the step has where nothing is injected."""
    replay_step(two / name / "skipped/replay/step-0000003/replay.json")
    loss = float(capsys.readouterr().out.split("together: loss ")[1].split(",")[0])
    assert loss == pytest.approx(curve(two / name / "full")[3], rel=1e-5)


@pytest.mark.slow
def test_files_of_shards_open(two: Path, base: Path) -> None:
    network = load_transformer(base)
    saved = {name: checkpoint(two / name / "full") for name in FAMILIES}
    assert open_checkpoint(saved["LCM"], ema=True).found.lcm
    student, target = (load_transformer(saved["LCM"], ema=ema).t_block[1].weight for ema in (False, True))
    assert not torch.equal(student, target) and not torch.equal(target, network.t_block[1].weight)
    assert read_adapter(saved["LCMLoRA"]).has_effect
    assert load_controlnet(saved["ControlNet"], network).controlnet[1].after_proj.weight.abs().max() > 0
    for folder in (saved["DMD"], saved["DMD"] / "fake_score"):
        assert not torch.equal(load_transformer(folder).t_block[1].weight, network.t_block[1].weight)
    assert read_adapter(two / "AdapterFamily/full").has_effect
    worlds = [json.loads((folder / "trainer.json").read_text())["world_size"] for folder in saved.values()]
    assert worlds == [2] * len(FAMILIES)


@pytest.mark.slow
def test_four_processes_whose_shards_are_uneven(
    configs: Path, two: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A block's table has six rows, that of the last layer two; hybrid_shard has two copies of two shards."""
    chosen, root = tmp_path_factory.mktemp("chosen"), tmp_path_factory.mktemp("four")
    (chosen / "LCM.json").write_text((configs / "LCM.json").read_text())
    run_workers(4, chosen, root, "families")
    for mode in ("full", "hybrid"):
        assert_same_training(root / "LCM" / mode, two / "LCM/ddp")


# ---- one process ----


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def network_of(kind: str) -> Any:
    torch.manual_seed(2)
    network: Any = PixArt(**SIZES, caption_channels=32, input_size=4)
    if kind == "control":
        network = ControlPixArt(network, 2)
    elif kind == "one step":
        network = OneStepNetworks(network, PixArt(**SIZES, caption_channels=32, input_size=4))
    elif kind == "adapter":
        start_lora(network, 4, use_dora=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return network


def sharded(network: Any, mesh: DeviceMesh, config_file: Path, *options: str) -> Any:
    keep_shell(network)
    shard(network, mesh, load_config(config_file, options))
    return network


INPUTS = (torch.randn(2, 4, 4, 4), torch.tensor([10.0, 300.0]), torch.randn(2, 3, 32))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["full_shard", "shard_grad_op"])
def test_a_sharded_target_is_the_average_in_every_call(strategy: str, mesh: DeviceMesh, config_file: Path) -> None:
    """Nothing of it stays gathered, and nothing of its calls stays noted: neither would ever be cleared."""
    option = f"parallel.strategy={strategy!r}"
    student, config = sharded(network_of("base"), mesh, config_file, option), load_config(config_file, [option])
    average = WeightAverage(student, 0.5, warm_up=False)
    target = place_frozen(shell_of(student), student, config)
    average.live_in(target)
    expected = network_of("base").eval()
    for _ in range(2):
        torch.testing.assert_close(target(*INPUTS), expected(*INPUTS))
        assert all(isinstance(parameter, DTensor) for parameter in target.parameters())
        assert not target._get_fsdp_state()._comm_ctx.post_forward_order
        assert not any(part._get_fsdp_state()._fsdp_param_group._post_forward_indices for part in target.blocks)
        for parameter, of_expected in zip(student.parameters(), expected.parameters()):
            parameter.mul_(3)
            of_expected.lerp_(parameter.full_tensor(), 0.5)
        average.update(student)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["base", "control", "one step", "adapter"])
def test_a_whole_copy_of_shards(kind: str, mesh: DeviceMesh, config_file: Path) -> None:
    network, reference = sharded(network_of(kind), mesh, config_file), network_of(kind)
    assert is_sharded(network) and all(isinstance(parameter, DTensor) for parameter in network.parameters())
    given = next(name for name, _ in network.named_parameters())
    copied = whole_copy(network, {given: torch.ones_like(reference.get_parameter(given))})
    assert not is_sharded(copied) and type(copied) is type(reference)
    reference.get_parameter(given).fill_(1)
    expected = reference.state_dict()
    assert copied.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in copied.state_dict().items())
    trained = [[parameter.requires_grad for parameter in each.parameters()] for each in (copied, reference)]
    assert trained[0] == trained[1]
    name = ("generator",) if kind == "one step" else ()
    more = {"control_latents": INPUTS[0]} if kind == "control" else {}
    output = copied(*name, *INPUTS, **more)
    assert torch.equal(output, reference(*name, *INPUTS, **more))
    torch.testing.assert_close(whole_copy(network, {})(*name, *INPUTS, **more), network(*name, *INPUTS, **more))


def test_an_adapter_is_read_into_shards(mesh: DeviceMesh, config_file: Path, tmp_path: Path) -> None:
    """With DoRA's magnitudes, of which that of a convolution is sharded along an axis of one."""
    reference, network = network_of("adapter"), network_of("adapter")
    family = AdapterFamily("base")
    family.write(family.saved(reference), reference, tmp_path, ema=False, stored_null_caption=False)
    for parameter in network.parameters():
        parameter.data.zero_()
    network = sharded(network, mesh, config_file)
    family.restore(network, tmp_path, ema=False)
    factors = family.saved(reference)
    assert any("lora_magnitude_vector" in name for name in factors)
    for name, tensor in family.saved(network).items():
        assert torch.equal(tensor.full_tensor(), factors[name]), name
