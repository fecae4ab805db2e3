"""Optimiser, learning-rate schedule and exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config import TrainConfig
from diffusion.errors import ConfigError

REFERENCE_BATCH = 256
_ADAM_EPS = 1e-10  # the original's


def scaled_learning_rate(config: TrainConfig, global_batch: int) -> float:
    """`optimizer.lr` under the auto_lr rule: times sqrt(global batch / 256), or linearly; None leaves it alone."""
    ratio = global_batch / REFERENCE_BATCH
    if config.auto_lr is None:
        return config.optimizer.lr
    return config.optimizer.lr * (math.sqrt(ratio) if config.auto_lr.rule == "sqrt" else ratio)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and scale-shift tables do not."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decays = [p for name, p in trainable if p.ndim > 1 and not name.endswith("scale_shift_table")]
    rest = [p for name, p in trainable if p.ndim <= 1 or name.endswith("scale_shift_table")]
    groups: list[dict[str, Any]] = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig, global_batch: int) -> torch.optim.Optimizer:
    """The optimiser of `config.optimizer` over the trainable parameters.

    Raises:
        ConfigError: nothing is trainable.
    """
    groups = parameter_groups(model, config.optimizer.weight_decay)
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
    import pytorch_optimizer

    if settings.type == "Muon":
        return _muon(pytorch_optimizer.Muon, model, settings.weight_decay, lr, options)
    if settings.type == "CAME" and "eps" in options:
        options["eps1"], options["eps2"] = options.pop("eps")
    built: torch.optim.Optimizer = getattr(pytorch_optimizer, settings.type)(groups, lr=lr, **options)
    return built


def _muon(
    cls: Callable[..., torch.optim.Optimizer], model: nn.Module, weight_decay: float, lr: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) on the matrices of the blocks, with updates of AdamW's size (arXiv:2502.16982).

    Embeddings, the last layer, biases and tables are AdamW's: orthogonal updates suit maps between hidden states.
    """
    hidden = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if "blocks." in name and parameter.ndim > 1 and not name.endswith("scale_shift_table")
    }
    groups = [
        {**group, "params": chosen, "use_muon": use_muon}
        for group in parameter_groups(model, weight_decay)
        for use_muon in (True, False)
        if (chosen := [parameter for parameter in group["params"] if (id(parameter) in hidden) == use_muon])
    ]
    momentum = {"momentum": options["momentum"]} if "momentum" in options else {}
    return cls(
        groups,
        lr=lr,
        use_adjusted_lr=True,
        adamw_lr=lr,
        adamw_betas=options.get("betas", (0.9, 0.999)),
        adamw_eps=options.get("eps", _ADAM_EPS),
        **momentum,
    )


def lr_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate as a function of the optimiser step (0 = the first).

    "constant"; "cosine": to 0 at the end; "cosine_decay_to_constant": to a tenth of the peak over the first two
    thirds of the steps, then flat. All after a linear warm-up.
    """
    warmup = config.lr_schedule_args.num_warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.lr_schedule == "constant":
            return 1.0
        end, floor = (total_steps, 0.0) if config.lr_schedule == "cosine" else (round(total_steps * 0.667), 0.1)
        progress = min((step - warmup) / max(end - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@torch.no_grad()
def blend(average: Mapping[str, Tensor], current: Mapping[str, Tensor], weight: float) -> None:
    """In place, under the average's keys: average + weight * (current - average); integer tensors are copied."""
    keys = [key for key, tensor in average.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in keys], [current[key] for key in keys], weight)
    for key in average.keys() - set(keys):
        average[key].copy_(current[key])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters and buffers, or where some parameters are frozen the others alone."""
    state: dict[str, Tensor] = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return state if len(trained) == len(list(model.parameters())) else {name: state[name] for name in trained}


class WeightAverage:
    """Exponential moving average of `trained_state`, in float32: avg <- rate * avg + (1 - rate) * value.

    Buffers that are not floating point are copied. Early in a run the rate is min(rate, (1 + n) / (10 + n)) after
    n updates, so that the average forgets its start.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.num_updates = 0
        self.tensors = {key: tensor.detach().clone() for key, tensor in trained_state(model).items()}

    def update(self, model: nn.Module) -> None:
        """Fold in the current weights."""
        self.num_updates += 1
        rate = min(self.rate, (1 + self.num_updates) / (10 + self.num_updates))
        blend(self.tensors, trained_state(model), 1 - rate)

    @torch.no_grad()
    def load(self, state_dict: dict[str, Tensor], num_updates: int) -> None:
        """Continue an average that was saved; keys absent from `state_dict` (position table) stay."""
        for key, tensor in state_dict.items():
            self.tensors[key].copy_(tensor)
        self.num_updates = num_updates


def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, on the device, without reading it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
