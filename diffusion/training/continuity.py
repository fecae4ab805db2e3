"""Is a resumed run the run that was saved? What changed in its config and data, and which changes do no harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash
from pydantic import ValidationError

from diffusion.config import TrainConfig
from diffusion.errors import ConfigError
from diffusion.training.run_log import LOGGER

ALLOW = "--allow-config-change"
# Keys (or sections) that leave the weights what they would have become, but for the order of float sums. The batch is
# cut otherwise when the number of processes changes; that its size stays is checked by itself. Where the data lies may
# change, since the data is compared by its contents.
_HARMLESS = (
    "pipeline_load_from", "data_root", "data.root", "num_workers",
    "log_interval", "save_model_epochs", "save_model_steps", "checkpoints_total_limit", "checkpoints_keep_every",
    "save_async", "max_failed_saves", "eval_sampling_steps", "validation", "train_batch_size",
    "gradient_accumulation_steps", "grad_checkpointing", "grad_checkpointing_args", "compile", "cuda_graph", "use_fsdp",
    "parallel", "deterministic", "health", "vae_pretrained", "posthoc_ema", "kernels.attention", "kernels.head_width",
    "kernels.text", "kernels.fused", "kernels.mlp",
)  # fmt: skip
_ABOUT_THIS_START = ("work_dir", "load_from", "resume_from")  # not compared at all
_LENGTH = ("max_steps", "num_epochs")  # harmless while the learning rate does not depend on the end of the run


def check_config(saved: Mapping[str, Any], config: TrainConfig, *, allow: bool) -> None:
    """Show what changed since a checkpoint was saved, and refuse what changes the training.

    Args:
        saved: the config in the checkpoint's trainer.json.
        allow: go on all the same.
    Raises:
        ConfigError: every harmful change, in one line.
    """
    try:
        # Through the schema, so that keys which are younger than the checkpoint get their defaults.
        before = flatten(TrainConfig.from_json(json.dumps(saved)).model_dump(mode="json"))
    except ValidationError:
        before = flatten(saved)
    now = flatten(config.model_dump(mode="json"))
    keys = [key for key in sorted(before.keys() | now.keys()) if not _is_below(key, _ABOUT_THIS_START)]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    harmless = _HARMLESS + (_LENGTH if config.lr_schedule == "constant" else ())
    harmful = [key for key in changed if not _is_below(key, harmless)]
    lines = {key: f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in changed}
    if harmful and not allow:
        raise ConfigError(
            f"the config changed since the checkpoint: {', '.join(lines[key] for key in harmful)}; set it back, or add "
            f"{ALLOW} to go on with it"
        )
    for key, line in lines.items():
        LOGGER.info("config changed since the checkpoint: %s%s", line, f" ({ALLOW})" if key in harmful else "")


def with_saved_start(config: TrainConfig, given: str | None, saved: str | None) -> TrainConfig:
    """The config of a resumed run whose weights are the checkpoint's: it names what the run began from, nothing else.

    Args:
        given: starting weights that this start names, which are not read. saved: those of the run's first start.
    """
    if given is not None and given != saved:
        LOGGER.warning("load_from=%s is not read: the run goes on from its checkpoint; it began from %s", given, saved)
    return config.model_copy(update={"load_from": saved})


def data_identity(dataset: Any) -> dict[str, Any]:
    """What tells a data set apart: its size, its samples in their order, and what made their features; JSON values."""
    digest = xxhash.xxh3_128()
    stores = getattr(dataset, "feature_stores", None)
    if stores is None:  # the original's layouts say no more than the names of their files
        for entry in dataset.entries:
            digest.update(repr((entry.key, entry.bucket)).encode())
        return {"samples": len(dataset), "hash": digest.hexdigest()}
    for store in stores:
        shards = [(shard["rows"], shard["xxh3_128"]) for shard in store.manifest["shards"]]
        digest.update(json.dumps([store.fingerprint, shards], sort_keys=True).encode())
    return {"samples": len(dataset), "hash": digest.hexdigest()}


def check_data(saved: Mapping[str, Any] | None, dataset: Any, source: object, *, allow: bool) -> None:
    """Refuse to go on with other samples than before.

    Args:
        saved: `data_identity` in the checkpoint's trainer.json; None = not recorded.
        source: names the data in the error.
    Raises:
        ConfigError: the data is not that of the checkpoint.
    """
    now = data_identity(dataset)
    if saved is None or saved == now:
        return
    text = (
        f"{source} is not the data of the checkpoint: it has {now['samples']} samples (hash {now['hash'][:8]}), the "
        f"checkpoint saw {saved['samples']} ({saved['hash'][:8]})"
    )
    if not allow:
        raise ConfigError(f"{text}; give the same data, or add {ALLOW} to go on with this")
    LOGGER.info("%s (%s)", text, ALLOW)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
