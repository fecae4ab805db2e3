"""DreamBooth (arXiv:2208.12242): a few pictures of one subject under a prompt with a rare word, learned by all weights
or by an adapter.

Prior preservation needs no loss of its own: the model draws pictures of the class first, and they are drawn into the
batches `prior_weight` times as often as those of the subject, which weighs the two losses alike in expectation.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusion.checkpoints.files import locate
from diffusion.config import DataConfig, TrainConfig, config_overrides, flag_overrides, load_config
from diffusion.errors import ConfigError, DataError
from diffusion.features import ExtractionSettings
from diffusion.features.extract import Encoders
from diffusion.features.sources import PictureFile, Sample, Source
from diffusion.features.sources.folder import find_pictures
from diffusion.features.sources.sample import collect
from diffusion.inference.batch import load_pipeline, sample_to_folder
from diffusion.ranks import Ranks
from diffusion.training.program import train_config
from diffusion.training.publishing import require_account_if_asked
from diffusion.training.run_features import extract_for_run
from diffusion.training.run_log import LOGGER, configure_logging
from diffusion.training.work_dir import require_startable

_DRAWN_AT_ONCE = 8
_FLAGS = {
    "lr": "optimizer.lr",
    "save_step": "save_model_steps",
    "train_class": "data.root",
    "token": "data.token",
    "class_prompt": "data.class_prompt",
    "num_class_images": "data.num_class_images",
    "prior_weight": "data.prior_weight",
    "rank": "lora.rank",
}


def train_dreambooth(args: argparse.Namespace, choices: dict[str, Callable[[], Sequence[str]]] | None = None) -> Path:
    """Run train_scripts/train_dreambooth.py; returns the run folder.

    Raises:
        PixArtError: a flag, the config, the model or the pictures cannot be used.
    """
    overrides, named = flag_overrides(args, _FLAGS)
    if args.train_class is not None and Path(args.train_class).is_dir():  # else below data_root, as the original's
        overrides.append(f"data.root={str(Path(args.train_class).resolve())!r}")
    if args.prompt is not None:
        overrides.append(f"data.prompt={[args.prompt]!r}")
    config = load_config(args.config, [*config_overrides(args), *overrides], choices=choices, flags=named)
    check_prompts(config)
    for name in ("num_class_images", "prior_weight"):
        if getattr(args, name) is not None and config.data.class_prompt is None:
            raise ConfigError(f"--{name} is given without --class_prompt; give what the subject is one of")
    require_account_if_asked(args)
    work_dir = Path(args.work_dir or config.work_dir)
    resume_from = args.resume_from or config.resume_from.checkpoint
    ranks = Ranks()
    if ranks.is_main:
        require_startable(work_dir, resume_from)
        work_dir.mkdir(parents=True, exist_ok=True)
    configure_logging(work_dir, is_main=ranks.is_main)
    if config.data.token is None and config.data.class_prompt is None:
        LOGGER.info("no --token, no --class_prompt: nobody checks that %r has a word of its own", config.data.prompt[0])
    if resume_from is None and config.load_from is not None:
        locate(config.load_from)  # before pictures are encoded for a model that is not there
    return train_config(args, with_features(config, work_dir, ranks), ranks=ranks)


def check_prompts(config: TrainConfig) -> None:
    """Refuse a config whose prompt cannot name the subject.

    Raises:
        ConfigError: not a DreamBooth config, no model to start from, or a prompt that says no more than the class.
    """
    data = config.data
    if data.type != "DreamBooth":
        raise ConfigError(f"data.type={data.type!r} is not read by this program; use DreamBooth, or train.py")
    if config.load_from is None:
        raise ConfigError("DreamBooth teaches a trained model: give its weights with --load-from")
    if config.multi_scale:
        raise ConfigError("multi_scale=True is not offered for DreamBooth; set it to False")
    if len(data.prompt) != 1:
        raise ConfigError(f"data.prompt={list(data.prompt)} must hold one prompt, the caption of all pictures")
    prompt, token = data.prompt[0], data.token
    for name, text in (("prompt", prompt), ("class_prompt", data.class_prompt), ("token", token)):
        if text is not None and not text.strip():
            raise ConfigError(f"data.{name} is empty; give words" + ("" if name == "prompt" else ", or leave it out"))
    if token is not None and not _contains(prompt, token):
        raise ConfigError(f"data.prompt={prompt!r} does not contain the token {token!r}; name the subject by it")
    if data.class_prompt is None:
        return
    new = set(_words(prompt)) - set(_words(data.class_prompt))
    if not new or (token is not None and _contains(data.class_prompt, token)):
        raise ConfigError(
            f"data.prompt={prompt!r} has no word that data.class_prompt={data.class_prompt!r} lacks; put a rare word "
            "for the subject into the prompt alone, as 'sks'"
        )


def with_features(config: TrainConfig, work_dir: Path, ranks: Ranks) -> TrainConfig:
    """The config of the run itself: features of the subject's pictures, and of the class's if it has a prompt.

    Raises:
        DataError: no pictures. CheckpointError: the model or its encoders are missing.
    """
    data = config.data
    folder = Path(config.data_root) / data.root
    source = captioned_pictures(folder, data.prompt[0])
    pretrained = encoders_of(config)
    settings = ExtractionSettings(image_size=config.image_size, max_length=config.model_max_length, batch_size=4)
    # A picture of a handful that cannot be used is worth a stop.
    chosen = extract_for_run(source, work_dir, pretrained, settings, ranks, name="features", max_rejected=0.0)
    keys: dict[str, Any] = {"type": "Store", "root": chosen["root"]}
    if data.class_prompt is not None:
        pictures = draw_class(config, data, work_dir / "class_pictures", pretrained, ranks)
        of_class = captioned_pictures(pictures, data.class_prompt)
        other = extract_for_run(of_class, work_dir, pretrained, settings, ranks, name="class-features")
        share = data.prior_weight * len(source.samples) / len(of_class.samples)
        keys["mix"] = {keys["root"]: 1.0, other["root"]: share}
        LOGGER.info("%d pictures of the class, %.3g for each of the subject", len(of_class.samples), data.prior_weight)
    validation = config.validation
    if not validation.prompts and validation.prompt_file is None:  # what is learned, and what must not be lost
        prompts = [data.prompt[0]] * 3 + [data.class_prompt] * (3 if data.class_prompt is not None else 0)
        validation = validation.model_copy(update={"prompts": tuple(prompts)})
    said = data.model_dump(include={"prompt", "token", "class_prompt", "num_class_images", "prior_weight"})
    changed = {"data_root": "/", "data": {**said, **keys}, "validation": validation.model_dump()}
    return TrainConfig.model_validate({**config.model_dump(), **changed})


def encoders_of(config: TrainConfig) -> Path:
    """Where the run finds T5 and the VAE: a pipeline, or the original's download folder around `vae_pretrained`."""
    return Path(config.pipeline_load_from) if config.pipeline_load_from else Path(config.vae_pretrained).parent


def captioned_pictures(folder: Path, caption: str) -> Source:
    """All pictures of a folder under one caption; texts beside them are not read.

    Raises:
        DataError: no such folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the subject's pictures (--train_class)")
    found, clashes = find_pictures(folder)
    if not found:
        raise DataError(f"{folder}: no pictures; put a few of the subject there, or choose another --train_class")
    makers = [(key, partial(Sample, key, PictureFile(path), (caption,))) for key, path in found.items()]
    return collect(str(folder), "folder of pictures", [*makers, *clashes])


def draw_class(config: TrainConfig, data: DataConfig, folder: Path, pretrained: Path, ranks: Ranks) -> Path:
    """Pictures of the class by the model before training, drawn like those of validation; those there are kept."""
    assert config.load_from is not None and data.class_prompt is not None
    if ranks.is_main:
        encoders = Encoders.find(pretrained)
        pipeline = load_pipeline(
            config.load_from, pretrained, text_encoder=encoders.text, vae=encoders.vae, algorithm="dpm-solver"
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(ranks.device)
        LOGGER.info("drawing %d pictures of the class %r", data.num_class_images, data.class_prompt)
        sample_to_folder(
            pipeline,
            [data.class_prompt],
            folder,
            model=str(config.load_from),
            seed=config.seed,
            batch_size=_DRAWN_AT_ONCE,
            num_images=data.num_class_images,
            settings={
                "height": config.image_size,
                "width": config.image_size,
                "num_inference_steps": config.validation.num_inference_steps,
                "guidance_scale": config.validation.guidance_scale,
            },
        )
        del pipeline
        gc.collect()
    ranks.barrier()
    return folder


def _contains(prompt: str, token: str) -> bool:
    """Whether a prompt has a token, which may be several words or be set off by signs (`<sks>`)."""
    words = _words(token)
    return bool(words) and f" {' '.join(words)} " in f" {' '.join(_words(prompt))} "


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
