"""Optimiser, learning-rate schedule and exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config import TrainConfig
from diffusion.errors import ConfigError
from diffusion.training.low_bit import adamw_8bit
from diffusion.training.sharding import live_tensors, local, mesh_of, part_like, sum_over_shards

REFERENCE_BATCH = 256
_ADAM_EPS = 1e-10  # the original's


def scaled_learning_rate(config: TrainConfig, global_batch: int) -> float:
    """`optimizer.lr` under the auto_lr rule: times sqrt(global batch / 256), or linearly; None leaves it alone."""
    ratio = global_batch / REFERENCE_BATCH
    if config.auto_lr is None:
        return config.optimizer.lr
    return config.optimizer.lr * (math.sqrt(ratio) if config.auto_lr.rule == "sqrt" else ratio)


def parameter_groups(
    model: nn.Module, weight_decay: float, patterns: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and scale-shift tables do not.

    Args:
        patterns: weight decay by name, instead of this rule; the first pattern that matches counts.
    Raises:
        ConfigError: a pattern matches no trainable weight that an earlier one has left.
    """
    patterns = patterns or {}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {("matrices", weight_decay): [], ("others", 0.0): []}
    unused = dict(patterns)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matching = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        if matching is not None:
            unused.pop(matching, None)
            groups.setdefault((matching, patterns[matching]), []).append(parameter)
        elif parameter.ndim > 1 and not name.endswith("scale_shift_table"):
            groups["matrices", weight_decay].append(parameter)
        else:
            groups["others", 0.0].append(parameter)
    if unused:
        raise ConfigError(
            f"optimizer.weight_decay_patterns: {next(iter(unused))!r} matches no weight (or an earlier pattern takes "
            f"them all); a name is e.g. {next(iter(dict(model.named_parameters())))!r}"
        )
    return [{"params": group, "weight_decay": decay} for (_, decay), group in groups.items() if group]


def build_optimizer(model: nn.Module, config: TrainConfig, global_batch: int) -> torch.optim.Optimizer:
    """The optimiser of `config.optimizer` over the trainable parameters.

    Raises:
        ConfigError: nothing is trainable.
    """
    groups = parameter_groups(model, config.optimizer.weight_decay, config.optimizer.weight_decay_patterns)
    if not groups:
        raise ConfigError("the model has no trainable parameters")
    lr, settings = scaled_learning_rate(config, global_batch), config.optimizer
    given = {"betas": settings.betas, "eps": settings.eps, "momentum": settings.momentum}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if settings.type == "SGD":
        return torch.optim.SGD(groups, lr=lr, **options)
    if settings.type in ("AdamW", "Adam"):
        cls = torch.optim.AdamW if settings.type == "AdamW" else torch.optim.Adam
        return cls(groups, lr=lr, fused=True, **{"eps": _ADAM_EPS, **options})
    if settings.type == "AdamW8bit":
        return adamw_8bit(groups, lr, options)
    if settings.type == "Muon":
        from diffusion.training.muon import muon

        return muon(model, groups, lr, "blocks.", **{"eps": _ADAM_EPS, **options})
    import pytorch_optimizer

    if settings.type == "CAME" and "eps" in options:
        options["eps1"], options["eps2"] = options.pop("eps")
    built: torch.optim.Optimizer = getattr(pytorch_optimizer, settings.type)(groups, lr=lr, **options)
    return built


def lr_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate as a function of the optimiser step (0 = the first).

    "constant"; "linear", "cosine": to 0 at the end; "cosine_decay_to_constant": to a tenth of the peak over the first
    two thirds of the steps, then flat. All after a linear warm-up.
    """
    warmup = config.lr_schedule_args.num_warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.lr_schedule == "constant":
            return 1.0
        if config.lr_schedule == "linear":
            return max(0.0, (total_steps - step) / max(total_steps - warmup, 1))
        end, floor = (total_steps, 0.0) if config.lr_schedule == "cosine" else (round(total_steps * 0.667), 0.1)
        progress = min((step - warmup) / max(end - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@torch.no_grad()
def blend(average: Mapping[str, Tensor], current: Mapping[str, Tensor], weight: float) -> None:
    """In place, under the average's keys: average + weight * (current - average); integer tensors are copied."""
    keys = [key for key, tensor in average.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([local(average[key]) for key in keys], [local(current[key]) for key in keys], weight)
    for key in average.keys() - set(keys):
        local(average[key]).copy_(local(current[key]))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters and buffers, or where some parameters are frozen the others alone."""
    state: dict[str, Tensor] = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) == len(list(model.parameters())):
        return state
    return {name: tensor for name, tensor in state.items() if name in trained}  # in one order on all processes


class WeightAverage:
    """Exponential moving average of `trained_state`, in float32: avg <- rate * avg + (1 - rate) * value.

    Buffers that are not floating point are copied; of a sharded network each process averages its shards. Early in a
    run the rate is min(rate, (1 + n) / (10 + n)) after n updates, so that the average forgets its start; warm_up False
    = `rate` always. keys: of the state dict; None = `trained_state`.
    """

    def __init__(
        self, model: nn.Module, rate: float, *, warm_up: bool = True, keys: Collection[str] | None = None
    ) -> None:
        self.rate, self.warm_up = rate, warm_up
        self.num_updates = 0
        state = trained_state(model) if keys is None else model.state_dict()
        self.tensors = {key: state[key].detach().clone() for key in (state if keys is None else keys)}

    @property
    def next_weight(self) -> float:
        """Share that the next weights have in the average."""
        count = self.num_updates + 1
        return 1 - (min(self.rate, (1 + count) / (10 + count)) if self.warm_up else self.rate)

    def update(self, model: nn.Module, *, done: Collection[str] = ()) -> None:
        """Fold in the current weights; those of the keys in `done` have been, with `next_weight`."""
        weight = self.next_weight
        self.num_updates += 1
        rest = {key: tensor for key, tensor in self.tensors.items() if key not in done} if done else self.tensors
        blend(rest, live_tensors(model), weight)

    @torch.no_grad()
    def live_in(self, model: nn.Module) -> None:
        """Move into the tensors of a network, of which it averages everything: from now on the network is the average.

        Args:
            model: laid out as the averaged one; what it held is overwritten.
        """
        for key, tensor in model.state_dict().items():
            local(tensor).copy_(local(self.tensors[key]))
            self.tensors[key] = tensor.detach()

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor], num_updates: int) -> None:
        """Continue an average that was saved; keys absent from `state_dict` (position table) stay."""
        for key, tensor in state_dict.items():
            self.tensors[key].copy_(part_like(self.tensors[key], tensor))
        self.num_updates = num_updates


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, shards of all processes included, on the device, without reading it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm, mesh = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients]), mesh_of(gradients)
    # `parallel.shard` puts all of a network on one mesh.
    return norm if mesh is None else sum_over_shards(norm.square(), mesh).sqrt()


def update_unless(skip: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """One optimiser step, or none at all where `skip` is 1.

    The fused Adams and Muon read the flag on the device, as they do for GradScaler, and the host never waits. For
    others the host reads it, which costs the GPU the time that the launches of the update take.

    Args:
        skip: () float32 on the device, 0 or 1, equal on all processes.
    """
    if scaler.is_enabled():
        # Its own flag is about this process's gradients; shards of others may differ.
        for found_inf in scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(skip)
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip.item():
        optimizer.step()
