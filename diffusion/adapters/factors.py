"""An adapter as plain tensors: low-rank factors by layer, compared with the network that they are meant for.

LoRA (arXiv:2106.09685) adds alpha / r * up @ down to a weight; DoRA (arXiv:2402.09353) then rescales each output row
to a learned magnitude. rsLoRA (arXiv:2312.03732) divides by sqrt(r), which is a LoRA with alpha * sqrt(r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.adapters.splitting import FUSED, SplitProjection
from diffusion.checkpoints import module_names
from diffusion.errors import CheckpointError
from diffusion.models import PixArt

_SHOWN = 6  # names in an error


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one layer.

    Args:
        down: (r, in), or (r, in, kh, kw) of a convolution.
        up: (out, r), or (out, r, 1, 1).
        alpha: the product is scaled by alpha / r.
        magnitude: (out,) of DoRA; None = plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weight without DoRA's magnitude, (out, in), float32."""
        return self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)


@dataclass(frozen=True)
class Adapter:
    """Factors by diffusers name of their layer, and where they came from.

    Args:
        base_model: what the file says that it was trained on; "" = nothing.
        prediction_type: what the file says that its base predicts, as `PixArtConfig`; "" = nothing.
    """

    source: str
    layers: Mapping[str, Factors]
    base_model: str = ""
    prediction_type: str = ""

    @property
    def is_dora(self) -> bool:
        return any(factors.magnitude is not None for factors in self.layers.values())

    @property
    def has_effect(self) -> bool:
        """Whether a factor `up`, which is zero before training, has moved anywhere."""
        return any(bool(factors.up.any()) for factors in self.layers.values())


def layer_weights(network: PixArt) -> dict[str, tuple[int, ...]]:
    """Shape of every weight that an adapter may change, by diffusers name; parts of fused projections are separate."""
    shapes: dict[str, tuple[int, ...]] = {}
    for native, name in module_names(network.config.depth).items():
        path, _, part = native.rpartition(".")
        is_part = part.startswith("to_")
        try:
            layer: Any = network.get_submodule(path if is_part else native)
        except AttributeError:
            continue  # an option that this network does not have, such as size conditions
        if isinstance(layer, SplitProjection):
            shapes[name] = tuple(layer.get_submodule(part).weight.shape)  # type: ignore[union-attr,arg-type]
        elif is_part:
            rows, columns = layer.weight.shape
            shapes[name] = (rows // len(FUSED[path.split(".", 2)[2]]), columns)
        elif isinstance(getattr(layer, "weight", None), Tensor) and layer.weight.ndim > 1:
            shapes[name] = tuple(layer.weight.shape)
    return shapes


def require_base(adapter: Adapter, network: PixArt) -> None:
    """Refuse an adapter of another network before anything is changed.

    Raises:
        CheckpointError: layers that the network lacks, or of other sizes, the first of them with both sizes; or a
            network that predicts something else.
    """
    shapes = layer_weights(network)
    unknown = [name for name in adapter.layers if name not in shapes]
    sizes = []
    for name, factors in adapter.layers.items():
        given = (factors.up.shape[0], *factors.down.shape[1:])
        if name in shapes and given != shapes[name]:
            sizes.append(f"{name} (adapter {given}, model {shapes[name]})")
        elif name in shapes and factors.magnitude is not None and factors.magnitude.shape != shapes[name][:1]:
            sizes.append(f"{name} (adapter {tuple(factors.magnitude.shape)} magnitudes, model {shapes[name]})")
    config = network.config
    kind = adapter.prediction_type or config.prediction_type  # files of others do not say
    if not unknown and not sizes and kind == config.prediction_type:
        return
    base = f"; it says it was trained on {adapter.base_model}" if adapter.base_model else ""
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (("layers the model lacks", unknown), ("layers of another size", sizes))
        if names
    ]
    if kind != config.prediction_type:
        problems.append(f"its base predicts {kind}, this one {config.prediction_type}")
    raise CheckpointError(
        f"{adapter.source} was made for another model than this one of width {config.hidden_size} and depth "
        f"{config.depth}{base}; {'; '.join(problems)}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@torch.no_grad()
def relative_norms(network: PixArt, adapter: Adapter) -> dict[str, float]:
    """Size of each layer's change over that of its weight (Frobenius norms), by diffusers name."""
    from diffusion.adapters.injection import base_weights

    weights = base_weights(network)
    return {
        name: float(factors.delta().norm() / weights[name].float().norm().clamp(min=1e-12))
        for name, factors in adapter.layers.items()
    }
