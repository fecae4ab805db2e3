"""A step that was skipped, written down and run again: which samples, which timesteps, where it stops being finite."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints.training_state import require_free_space
from diffusion.config import TrainConfig, config_from_json
from diffusion.data import AspectRatioBatchSampler, SampleKey, collate
from diffusion.errors import CheckpointError, StorageError
from diffusion.ranks import Ranks
from diffusion.training.building import build_training_data
from diffusion.training.families import family_named
from diffusion.training.family import Family
from diffusion.training.optimization import WeightAverage, global_norm
from diffusion.training.parallel import AUTOCAST
from diffusion.training.run_log import LOGGER
from diffusion.training.sharding import gather, is_sharded
from diffusion.training.verdict import StepFacts

FORMAT_VERSION = 2  # 1 did not name the family
_WITH_WEIGHTS = 1  # steps of a run whose weights are kept; the samples of all skipped steps are


@dataclass
class StepRecorder:
    """Writes WORK/replay/step-N/replay.json, and the weights before the step for the first skipped step of a run.

    average: of the weights, if the step reads it.
    """

    config: TrainConfig
    ranks: Ranks
    sampler: AspectRatioBatchSampler
    dataset: Any
    network: Any
    folder: Path
    family: Family
    average: WeightAverage | None = None
    recorded: int = 0

    def record(self, step: int, facts: StepFacts) -> Path:
        """Write a step down, on the main process; all call it. A disk that fails is a line in the log."""
        path = self.folder / f"step-{step:07d}" / "replay.json"
        keeps_weights = self.recorded < _WITH_WEIGHTS
        self.recorded += 1
        weights = {}
        if keeps_weights and (self.ranks.is_main or is_sharded(self.network)):
            weights[False] = gather(self.family.saved(self.network), keep=self.ranks.is_main)
            if self.average is not None:
                weights[True] = gather(self.average.tensors, keep=self.ranks.is_main)
        if self.ranks.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                require_free_space(path.parent, sum(t.nbytes for tensors in weights.values() for t in tensors.values()))
                stored = self.config.null_caption == "stored"
                for ema, tensors in weights.items():
                    self.family.write(tensors, self.network, path.parent, ema=ema, stored_null_caption=stored)
                path.write_text(json.dumps(self._content(step, facts, bool(weights)), indent=1) + "\n")
            except (OSError, StorageError) as error:
                LOGGER.error("skipped step %d was not recorded: %s", step, error)
        return path

    def _content(self, step: int, facts: StepFacts, has_weights: bool) -> dict[str, Any]:
        epoch, position = divmod(step - 1, self.sampler.steps_per_epoch)
        numbers = range((step - 1) * self.sampler.global_batch, step * self.sampler.global_batch)
        samples = [
            {"index": index, "number": number, "key": self.dataset[SampleKey(index, number)].key}
            for index, number in zip(self.sampler.plan(epoch)[position], numbers)
        ]
        size, world = self.sampler.batch_size, self.sampler.world_size
        parts = [
            {"rank": part % world, "micro_batch": part // world, "samples": samples[part * size : (part + 1) * size]}
            for part in range(len(samples) // size)
        ]
        return {
            "format_version": FORMAT_VERSION,
            "step": step,
            "loss": repr(facts.loss),
            "grad_norm": repr(facts.grad_norm),
            "has_weights": has_weights,
            "family": type(self.family).__name__,
            "family_facts": self.family.facts(),
            "parts": parts,
            "config": self.config.model_dump(mode="json"),
        }


def replay_step(path: str | Path) -> None:
    """Run a recorded step of any family again in this process, part by part, and print what is finite and what is not.

    Args:
        path: replay.json of a skipped step.
    Raises:
        CheckpointError: it cannot be read, was recorded without weights, or its teacher or base is another one now.
        DataError: the features have gone.
    """
    path, device = Path(path), Ranks().device
    content = _read(path)
    config = config_from_json(json.dumps(content["config"]), str(path))
    dataset = build_training_data(config)
    family = family_named(content.get("family"), config)
    objective: Any = family.objective(config, dataset)
    network = _rebuilt(family, objective, config, content, path, device)
    print(f"step {content['step']} was skipped with loss {content['loss']}, gradient norm {content['grad_norm']}")
    losses, dtype = [], AUTOCAST[config.mixed_precision]
    for part in content["parts"]:
        samples = part["samples"]
        batch = collate([dataset[SampleKey(sample["index"], sample["number"])] for sample in samples])
        batch = batch.to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            output = objective.loss(network, batch, config.seed)
            (output.loss / len(content["parts"])).backward()
        losses.append(output.loss.item())
        print(f"  rank {part['rank']}, micro-batch {part['micro_batch']}: loss {losses[-1]:.6g}")
        timesteps = objective.draw_timesteps(config.seed, batch.sample_numbers)
        for line in _bad_samples(samples, output.metrics, timesteps, batch):
            print(f"    {line}")
    norm = global_norm(network.parameters()).item()
    bad = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    print(f"  together: loss {sum(losses) / len(losses):.6g}, gradient norm {norm:.6g}")
    if bad:
        print(f"  gradients that are not finite: {len(bad)}, the first {bad[0]}, the last {bad[-1]}")
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        print("the step is finite here: the samples and the weights are not the cause; suspect a device or the network")
    else:
        print("reproduced: the cause is in the samples or the weights of this step")


def _rebuilt(
    family: Family, objective: Any, config: TrainConfig, content: dict[str, Any], path: Path, device: torch.device
) -> Any:
    """The network as it was before the step, on the device, and the objective connected to what it needs beside it."""
    network = family.build_network(config, config.load_from, resuming=True)
    for name, value in content.get("family_facts", {}).items():
        if family.facts().get(name) != value:
            raise CheckpointError(
                f"{path}: the {name.replace('_', ' ')} was {value}, that of {config.load_from} is "
                f"{family.facts().get(name)}; put back the weights that the run was started with"
            )
    network = network.to(device)
    average = None
    if family.steps_read_average:
        family.restore(network, path.parent, ema=True)
        average = family.build_average(network, config)
    family.restore(network, path.parent, ema=False)
    family.connect(objective, network, average, config)
    return network.train()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version, has_weights = content["format_version"], content["has_weights"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"--replay {path} cannot be read ({error}); give WORK/replay/step-N/replay.json"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"--replay {path} has format {version}, newer than this program's {FORMAT_VERSION}")
    if not has_weights:
        raise CheckpointError(
            f"--replay {path} names the samples of its step but holds no weights; the run kept those of the first "
            f"skipped step: {sorted(path.parent.parent.glob('step-*'))[0] / path.name}"
        )
    return content


def _bad_samples(samples: list[dict[str, Any]], metrics: dict[str, Any], timesteps: Any, batch: Any) -> list[str]:
    """One line a sample whose features or loss terms are not finite."""
    lines = []
    for index, sample in enumerate(samples):
        terms = {name: values[index].item() for name, values in metrics.items()}
        features = {
            name: bool(getattr(batch, name)[index].isfinite().all())
            for name in ("latents_mean", "latents_std", "caption_embeds")
        }
        wrong = [f"{name} {value}" for name, value in terms.items() if not math.isfinite(value)]
        wrong += [f"{name} holds NaN or infinity" for name, finite in features.items() if not finite]
        if wrong:
            lines.append(f"{sample['key']} (number {sample['number']}, t {timesteps[index]:g}): {', '.join(wrong)}")
    return lines
