"""Power-function averages of a run: kept while it trains, stored as snapshots, mixed into one average afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffusion.checkpoints import (
    TensorFile,
    load_weights,
    materialize_buffers,
    new_folder,
    require_fit,
    save_tensors,
    save_transformer,
)
from diffusion.checkpoints.training_state import require_free_space
from diffusion.config import TrainConfig
from diffusion.errors import CheckpointError, ConfigError
from diffusion.files import sync
from diffusion.training.building import model_options
from diffusion.training.optimization import blend
from diffusion.training.posthoc_ema import Profile, combine, gamma_of, update_weight
from diffusion.training.sharding import live_tensors, part_like
from diffusion.training.starting import new_network

FOLDER = "posthoc_ema"
_NAME = re.compile(r"^step-(\d+)_sigma_rel-(\d[\d.e-]*)\.safetensors$")
_ASIDE = ".tmp-"


class PosthocAverages:
    """Power-function averages of parameters and buffers, in the network's float32, one a sigma_rel."""

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        self._gammas = {sigma_rel: gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        self.tensors = {
            sigma_rel: {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
            for sigma_rel in sigma_rels
        }

    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after optimiser step `step`, 1 = the first."""
        current = live_tensors(model)
        for sigma_rel, average in self.tensors.items():
            blend(average, current, update_weight(self._gammas[sigma_rel], step))

    def write(self, folder: Path, step: int, dtype: torch.dtype) -> None:
        """See `write_averages`."""
        write_averages(self.tensors, folder, step, dtype)

    @torch.no_grad()
    def read(self, folder: Path, step: int) -> None:
        """Continue the averages that `write` left in float32.

        Raises:
            CheckpointError: averages of other sigma_rels, or none.
        """
        found = sorted(profile.sigma_rel for profile in list_snapshots(folder))
        if found != sorted(self.tensors):
            raise CheckpointError(
                f"{folder.parent} was saved with posthoc_ema.sigma_rels {found}, the config asks for "
                f"{sorted(self.tensors)}; make them equal, or set posthoc_ema=None to resume without"
            )
        for sigma_rel, average in self.tensors.items():
            stored = TensorFile(snapshot_path(folder, Profile(step, sigma_rel)))
            for key, tensor in average.items():
                tensor.copy_(part_like(tensor, stored[key]))


def write_averages(averages: Mapping[float, Mapping[str, Tensor]], folder: Path, step: int, dtype: torch.dtype) -> None:
    """One safetensors file an average, native keys, the step and sigma_rel in its name.

    Raises:
        StorageError: the disk is too full for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = sum(tensor.numel() for average in averages.values() for tensor in average.values())
    require_free_space(folder, values * dtype.itemsize)
    for sigma_rel, average in averages.items():
        path = snapshot_path(folder, Profile(step, sigma_rel))
        aside = path.with_name(f"{_ASIDE}{path.name}")
        save_tensors({key: tensor.to("cpu", dtype).contiguous() for key, tensor in average.items()}, aside)
        sync(aside)
        os.replace(aside, path)
    sync(folder)


def snapshot_path(folder: Path, profile: Profile) -> Path:
    """The file of an average; the name alone says which one it is."""
    return folder / f"step-{profile.step:07d}_sigma_rel-{profile.sigma_rel!r}.safetensors"


def list_snapshots(folder: Path) -> dict[Profile, Path]:
    """Every stored average, by step and sigma_rel, ascending."""
    named = [(match, path) for path in folder.glob("*.safetensors") if (match := _NAME.match(path.name))]
    return dict(sorted((Profile(int(match[1]), float(match[2])), path) for match, path in named))


def drop_snapshots_after(folder: Path, step: int) -> None:
    """Delete what belongs to steps that were lost, and what an interrupted write left behind."""
    lost = [path for profile, path in list_snapshots(folder).items() if profile.step > step]
    for path in [*lost, *folder.glob(f"{_ASIDE}*")]:
        path.unlink()


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` made: its last step, the stored averages it read, the error of its profile (0 = exact)."""

    step: int
    num_averages: int
    relative_error: float


def reconstruct(
    work_dir: str | Path, sigma_rel: float, output: str | Path, *, step: int | None = None
) -> Reconstruction:
    """Write the average of a length as a transformer folder that diffusers opens.

    Args:
        work_dir: of a run with `posthoc_ema` in its config.
        sigma_rel: length of the average as a share of the training time, in (0, 0.288).
        output: a new or empty folder.
        step: where the average ends; None = the last snapshot.
    Raises:
        ConfigError: sigma_rel or step outside its range.
        CheckpointError: no run or no snapshots, a damaged snapshot or one of another model, or output is not empty.
    """
    gamma_of(sigma_rel)  # refuses a wrong length before anything is read
    config = _run_config(Path(work_dir))
    stored = list_snapshots(Path(work_dir) / FOLDER)
    if not stored:
        raise CheckpointError(
            f"{work_dir} holds no snapshots in {FOLDER}/; train with posthoc_ema=dict(snapshot_every_steps=...)"
        )
    first, last = min(stored).step, max(stored).step
    step = last if step is None else step
    if not first <= step <= last:
        raise ConfigError(f"step={step} is outside the snapshots of {work_dir}; choose {first} to {last}")
    used = {profile: path for profile, path in stored.items() if profile.step <= step}
    combination = combine(list(used), Profile(step, sigma_rel))
    with torch.device("meta"):
        network = new_network(config.model, model_options(config))
    with new_folder(output) as folder:
        mixed = mix_snapshots(network, dict(zip(used.values(), combination.coefficients.tolist())))
        load_weights(network, mixed, work_dir, assign=True)
        materialize_buffers(network)
        save_transformer(network, folder, stored_null_caption=config.null_caption == "stored")
    return Reconstruction(step, len(used), combination.relative_error)


def mix_snapshots(network: nn.Module, coefficients: Mapping[Path, float]) -> dict[str, Tensor]:
    """Sum of coefficient * snapshot in float32 under native keys; one file is in memory at a time.

    Raises:
        CheckpointError: a file is damaged or does not fit the network, which may lie on the meta device.
    """
    mixed: dict[str, Tensor] = {}
    for path, coefficient in coefficients.items():
        tensors = dict(TensorFile(path))
        require_fit(network, tensors, path)
        for key, tensor in tensors.items():
            term = tensor.float().mul_(coefficient)
            mixed[key] = mixed[key].add_(term) if key in mixed else term
    return mixed


def _run_config(work_dir: Path) -> TrainConfig:
    path = work_dir / "config.json"
    try:
        return TrainConfig.from_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give the folder of a training run") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a config of this version ({error.errors()[0]['msg']})") from error
