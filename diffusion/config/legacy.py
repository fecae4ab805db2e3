"""Keys of the original's config files that are not fields here: accepted, and named once in a notice."""

from __future__ import annotations

from typing import Any

from diffusion.config.problems import KeyPath
from diffusion.config.schema_data import KEYS_READ_BY_TYPE, DataConfig

# The original defines these keys and no program of it reads them, or reading them changed nothing.
NEVER_READ = (
    "save_image_epochs",
    "gc_step",
    "tensorboard_mox_interval",
    "eval_batch_size",
    "mask_type",
    "num_group_tokens",
    "mask_loss_coef",
    "load_mask_index",
    "s3_work_dir",
    "window_block_indexes",
    "window_size",
    "use_rel_pos",
    "debug_nan",
    "load_ema",
)
NEVER_READ_IN_DATA = ("load_mask_index", "mask_ratio", "mask_type", "sample_subset")
# Sigma's keys whose work another key or rule does here.
REPLACED = {
    "visualize": "validation.every_steps and validation.prompts",
    "deterministic_validation": "validation.seed, which is always fixed",
    "skip_step": "resume_from, which restores the position in the data",
}
# Names that the original's files assign only to use them inside data=dict(...).
_HELPERS = ("image_list_json", "image_list_txt")


def take_legacy_keys(config: dict[str, Any]) -> list[str]:
    """Remove (in place) what the original's files carry without effect, and translate its other spellings.

    Returns:
        Notices, one line each.
    """
    data = config["data"] if isinstance(config.get("data"), dict) else {}
    never_read = [key for key in NEVER_READ if key in config]
    never_read += [f"data.{key}" for key in NEVER_READ_IN_DATA if key in data]
    notices = []
    if never_read:
        notices.append(f"ignored: {', '.join(never_read)} (the original never read them)")
    notices += [f"ignored: {key} (use {instead})" for key, instead in REPLACED.items() if key in config]
    unread = _unread_data_keys(data)
    unread += [key for key in _HELPERS if key in config and config[key] != data.get(key)]
    if unread:
        notices.append(f"ignored: {', '.join(unread)} (not read when data.type is {data.get('type')!r})")
    for path in [*never_read, *REPLACED, *unread, *_HELPERS]:
        owner, _, key = path.rpartition(".")
        (data if owner else config).pop(key, None)
    _move_validation_prompts(config)
    return notices


def resume_as_section(config: dict[str, Any]) -> None:
    """`resume_from='path'` and `resume_from=None` become the section's `checkpoint` (in place)."""
    if "resume_from" in config and not isinstance(config["resume_from"], dict):
        config["resume_from"] = {"checkpoint": config["resume_from"]}


def _unread_data_keys(data: dict[str, Any]) -> list[str]:
    read = KEYS_READ_BY_TYPE.get(str(data.get("type")))
    if read is None:
        return []
    known = set(DataConfig.model_fields) - {"type", "root"}
    return [f"data.{key}" for key in data if key in known - read]


def _move_validation_prompts(config: dict[str, Any]) -> None:
    """Sigma's top-level `validation_prompts` is `validation.prompts` here."""
    validation = config.get("validation", {})
    if "validation_prompts" in config and isinstance(validation, dict) and "prompts" not in validation:
        config["validation"] = {**validation, "prompts": config.pop("validation_prompts")}


def overridden_after_move(overridden: set[KeyPath]) -> set[KeyPath]:
    """Override key paths under the names that validation sees."""
    renamed = {("resume_from",): ("resume_from", "checkpoint"), ("validation_prompts",): ("validation", "prompts")}
    return overridden | {renamed[path] for path in overridden if path in renamed}
