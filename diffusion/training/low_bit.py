"""AdamW whose moments take one byte a weight each (arXiv:2110.02861), of torchao or of bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from diffusion.errors import ConfigError


def adamw_8bit(groups: list[dict[str, Any]], lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """torchao's, which runs on every device that torch.compile knows, or bitsandbytes' where that alone is installed.

    Raises:
        ConfigError: neither is installed.
    """
    if find_spec("torchao") is not None:
        return _torchao(groups, lr, options)
    if find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import AdamW8bit

        built: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, **options)
        return built
    raise ConfigError(
        "optimizer.type='AdamW8bit' needs torchao (pip install 'pixart[lowbit]') or bitsandbytes; install one of them "
        "or use AdamW"
    )


def _torchao(groups: list[dict[str, Any]], lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    class AdamW8bitByNumber(AdamW8bit):  # type: ignore[misc]
        """torchao's takes learning rates as tensors alone, since a number would be compiled anew in every step."""

        def step(self, closure: Any = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            try:
                return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates):
                    group["lr"] = rate

    built: torch.optim.Optimizer = AdamW8bitByNumber(groups, lr=lr, **options)
    return built
