"""Command line shared by the training scripts. Nothing here imports torch or mmengine, so --help is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from diffusion.config.arguments import ArgumentParser

CLOUD_DATA_ROOT = "/data/data"
# The LoRA program has the original's name for it, and takes those of the others, which messages give.
RESUME_FLAGS = ("--resume-from", "--resume_from", "--resume_from_checkpoint")
_EXAMPLE = "python train_scripts/train.py configs/emoji/emoji_256.py --work-dir output/my-run"


class _Debug(argparse.Action):
    """--debug: store True and ask `run_cli` for tracebacks."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        os.environ["PIXART_DEBUG"] = "1"
        setattr(namespace, self.dest, True)


class _LocalRank(argparse.Action):
    """--local-rank: the launcher's LOCAL_RANK, when set, wins over the flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, int(os.environ.get("LOCAL_RANK") or values))


def reporter(name: str) -> str:
    """The value of --report_to; the original let accelerate look for any tracker.

    Raises:
        argparse.ArgumentTypeError: another one, with what to do instead.
    """
    if name in ("tensorboard", "none"):
        return name
    upload = ", or upload its files with `pip install wandb && wandb sync WORK_DIR/logs`" if name == "wandb" else ""
    raise argparse.ArgumentTypeError(
        f"{name} is not offered; take tensorboard (`tensorboard --logdir WORK_DIR/logs` shows it{upload}) or none; "
        "metrics.jsonl in the run folder holds everything either way"
    )


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that upload a finished run; see `diffusion.training.publishing`."""
    add = parser.add_argument
    add("--push_to_hub", action="store_true", help="upload the result with its card at the end")
    add("--hub_model_id", help="repository to upload to; when absent the run folder's name, in your account")
    add("--hub_token", help="a token that may write; better: `hf auth login`, as others see arguments")


def train_parser(description: str | None, example: str = _EXAMPLE) -> ArgumentParser:
    """The parser of a training script; scripts add their own flags to it.

    `config_overrides(args)` turns the flags that are config keys into overrides for `load_config`.
    """
    parser = ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nA .py config is a program: it runs with your rights.",
    )
    add = parser.add_argument
    add("config", help="config file (.py)")
    add = parser.add_argument_group("run").add_argument
    add("--work-dir", "--work_dir", help="folder of logs and checkpoints, instead of the config's work_dir")
    add(*RESUME_FLAGS[:2], help="checkpoint folder to continue, or 'latest' of the work-dir")
    add(
        "--allow-config-change",
        "--allow_config_change",
        action="store_true",
        help="resume although keys or data that change the training are not those of the checkpoint; they are listed",
    )
    add("--load-from", "--load_from", help="weights to start from, instead of the config's load_from")
    add(
        "--cfg-options",
        "--cfg_options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override config keys, e.g. optimizer.lr=1e-4 max_steps=100",
    )
    roots = parser.add_argument_group("data").add_mutually_exclusive_group()
    roots.add_argument("--data-root", "--data_root", help="folder of the data, instead of the config's data_root")
    roots.add_argument(
        "--cloud",
        dest="data_root",
        action="store_const",
        const=CLOUD_DATA_ROOT,
        default=argparse.SUPPRESS,
        help=f"short for --data-root {CLOUD_DATA_ROOT}",
    )
    add = parser.add_argument_group("reporting").add_argument
    add(
        "--report_to",
        "--report-to",
        type=reporter,
        default="tensorboard",
        help="where metrics go, beside metrics.jsonl: tensorboard or none",
    )
    add("--tracker_project_name", default="text2image-fine-tune", help="TensorBoard run name")
    add("--loss_report_name", default="loss", help="TensorBoard tag of the training loss")
    add = parser.add_argument_group("launching").add_argument
    add(
        "--local-rank",
        "--local_rank",
        type=int,
        action=_LocalRank,
        default=int(os.environ.get("LOCAL_RANK") or -1),
        help="process number on this machine, set by launchers; the variable LOCAL_RANK wins; -1 = single process",
    )
    add_hub_flags(parser)
    add("--debug", action=_Debug, nargs=0, default=False, help="show tracebacks of errors; training is not changed")
    return parser


def flag_overrides(args: argparse.Namespace, keys: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Overrides for `load_config` by a program's own flags, and the names of those flags for its errors.

    Args:
        keys: flag without dashes -> config key. Flags that are not given leave the config's values.
    """
    given = {name: value for name in keys if (value := getattr(args, name)) is not None}
    return [f"{keys[name]}={value!r}" for name, value in given.items()], {keys[name]: f"--{name}" for name in given}


def config_overrides(args: argparse.Namespace) -> list[str]:
    """Overrides for `load_config`: --cfg-options, then the flags that name a config key, which win.

    A rank given by --local-rank (the older launcher) becomes LOCAL_RANK, where the trainer looks for it.
    """
    if args.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    flags = {"work_dir": args.work_dir, "load_from": args.load_from, "data_root": args.data_root}
    flags["resume_from.checkpoint"] = args.resume_from
    return [*args.cfg_options, *(f"{key}={value!r}" for key, value in flags.items() if value is not None)]
