"""The README.md of a run folder, as the hub reads it: base model, tags, licence, prompts with pictures, figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from diffusion.checkpoints.hub import hub_file, parse_hub_id
from diffusion.config import TrainConfig
from diffusion.errors import PixArtError
from diffusion.training.card_usage import family_settings, kind_of, relation, tags, usage
from diffusion.training.reports import GRID

CARD = "README.md"
_CHECKPOINT = re.compile(r"^checkpoint-\d+$")
_LICENCE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


def write_model_card(work_dir: Path, config: TrainConfig, step: int, family: str = "Family") -> Path:
    """Write `work_dir`/README.md from the run's config, metrics and validation pictures; returns its path.

    Args:
        family: name of the run's family, as `family_named` takes it.
    """
    base, licence = _base_model(config.load_from)
    rows = _metrics(work_dir)
    parts = [
        _front_matter(config, base, licence, work_dir, family),
        f"# {work_dir.resolve().name}\n\n{_summary(config, base, step, family)}",
        _licence_line(licence, base),
        _pictures(work_dir, config),
        "## Use\n\n" + usage(config, family),
        "## Settings\n\n" + _table(_settings(config, step, family)),
        "## Measured\n\n" + _table(_figures(rows, config)),
    ]
    path = work_dir / CARD
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _base_model(source: str | None) -> tuple[str | None, str | None]:
    """Name and licence of the model that training started from, as its own card says."""
    if source is None:
        return None, None
    hub_id, path = parse_hub_id(source), Path(source)
    of_checkpoint = _CHECKPOINT.match(path.name) is not None  # RUN/checkpoints/checkpoint-N; the run has the card
    folder = path.parents[1] if of_checkpoint else path
    try:
        card = hub_file(hub_id[0], CARD) if hub_id is not None else folder / CARD
        text = card.read_text(encoding="utf-8")
    except (PixArtError, OSError):
        text = ""
    found = _LICENCE.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    local = f"{folder.name}/{path.name}" if of_checkpoint else path.name
    return (hub_id[0] if hub_id is not None else local), found[1] if found else None


def _front_matter(config: TrainConfig, base: str | None, licence: str | None, work_dir: Path, family: str) -> str:
    all_tags = ["text-to-image", "pixart", "diffusers", "diffusers-training", *tags(config, family)]
    lines = ["---"]
    if licence is not None:
        lines.append(f"license: {licence}")
    if base is not None:
        lines += [f"base_model: {base}", f"base_model_relation: {relation(config, family)}"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", *(f"- {tag}" for tag in all_tags)]
    if config.data.prompt:
        lines.append(f"instance_prompt: {json.dumps(config.data.prompt[0], ensure_ascii=False)}")
    grids = _grids(work_dir)
    if grids:  # one picture shows all prompts
        text = json.dumps("; ".join(dict.fromkeys(_drawn(work_dir, config)["prompts"])), ensure_ascii=False)
        url = grids[-1].relative_to(work_dir).as_posix()
        lines += ["widget:", f"- text: {text}", "  output:", f"    url: {url}"]
    return "\n".join([*lines, "---"])


def _summary(config: TrainConfig, base: str | None, step: int, family: str) -> str:
    kind = "A PixArt transformer" if base is None else f"{kind_of(config, family)} `{base}`"
    subject = f" It draws what the prompt `{config.data.prompt[0]}` names." if config.data.prompt else ""
    return f"{kind}, trained for {step} steps at {config.image_size} px.{subject}"


def _licence_line(licence: str | None, base: str | None) -> str:
    if licence is not None:
        return f"Licence: {licence}, that of the base model."
    return f"Licence: that of the base model `{base}`; its card names none here." if base is not None else ""


def _pictures(work_dir: Path, config: TrainConfig) -> str:
    grids = _grids(work_dir)
    if not grids:
        return ""
    shown = {"Before": grids[0], "After": grids[-1]} if len(grids) > 1 else {"After": grids[-1]}
    drawn = _drawn(work_dir, config)
    prompts = ", ".join(f"`{prompt}`" for prompt in dict.fromkeys(drawn["prompts"]))
    count, guidance = drawn["num_inference_steps"], drawn["guidance_scale"]
    steps = f"{count} step{'s' if count > 1 else ''}, guidance {guidance:g}"
    lines = [f"## Pictures\n\nPrompts {prompts}; {steps}, seeds from {drawn['seed']}."]
    return "\n\n".join(
        [*lines, *(f"{name}:\n\n![{name}]({path.relative_to(work_dir).as_posix()})" for name, path in shown.items())]
    )


def _drawn(work_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """How the grids were drawn, as the run wrote it; of older runs as their config asked."""
    try:
        drawn: dict[str, Any] = json.loads((work_dir / "validation" / GRID).read_text(encoding="utf-8"))
        return drawn
    except OSError:
        return config.validation.model_dump(include={"prompts", "num_inference_steps", "guidance_scale", "seed"})


def _grids(work_dir: Path) -> list[Path]:
    return sorted((work_dir / "validation").glob("step_*.png"))


def _settings(config: TrainConfig, step: int, family: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "steps": step,
        "batch": f"{config.train_batch_size} a process, {config.gradient_accumulation_steps} accumulated",
        "optimiser": f"{config.optimizer.type}, lr {config.optimizer.lr:g}, {config.lr_schedule}, "
        f"{config.lr_schedule_args.num_warmup_steps} steps of warm-up, weight decay {config.optimizer.weight_decay:g}",
        "predicts": config.process.prediction_type,
        "precision": config.mixed_precision,
        "size": f"{config.image_size} px",
        "captions dropped": config.class_dropout_prob,
        "largest gradient norm": config.gradient_clip,
        "EMA": {"LCM": config.ema_decay, "LCMLoRA": None}.get(family, config.ema_rate),
        "seed": config.seed,
        **family_settings(config, family),
    }
    if config.lora is not None:
        lora = config.lora
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        settings["adapter"] = f"{kind}, rank {lora.rank}, alpha {lora.alpha:g}, base in {lora.base_dtype}"
    if config.data.prompt:
        settings["instance prompt"] = config.data.prompt[0]
    if config.data.class_prompt:
        settings["class prompt"] = f"{config.data.class_prompt} (weight {config.data.prior_weight:g})"
    return {name: value for name, value in settings.items() if value is not None}


def _figures(rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> dict[str, Any]:
    losses = [row["loss"] for row in rows if "loss" in row]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
    peaks = [row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row]
    figures: dict[str, str] = {}
    if losses:
        tail = losses[-max(len(losses) // 10, 1) :]
        figures["training loss, mean of the last tenth of the log"] = f"{sum(tail) / len(tail):.4f}"
    if validation:
        figures["validation loss, first and last"] = f"{validation[0]:.4f}, {validation[-1]:.4f}"
    if rates:
        figures["images a second, median"] = f"{median(rates):.2f}"
    if peaks:
        figures["peak memory of the card"] = f"{max(peaks):.2f} GiB"
    return figures


def _metrics(work_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (work_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
