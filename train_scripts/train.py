"""Train PixArt on precomputed features.

python train_scripts/train.py configs/emoji/emoji_demo.py --work-dir output/demo
torchrun --nproc-per-node 8 train_scripts/train.py CONFIG --work-dir DIR --resume-from latest
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusion.config import config_overrides, load_config, train_parser
from diffusion.errors import run_cli


def registered_models() -> Sequence[str]:
    """Names a config may give as `model`; imports torch."""
    from diffusion.models import model_names

    return model_names()


def main() -> None:
    args = train_parser(__doc__).parse_args()
    config = load_config(args.config, config_overrides(args), choices={"model": registered_models})

    from diffusion.training import Reporting, Trainer, denoising_objective
    from diffusion.training.publishing import publish_if_asked, require_account_if_asked

    require_account_if_asked(args)
    trainer = Trainer(
        config,
        denoising_objective,
        args.work_dir or config.work_dir,
        resume_from=args.resume_from,
        load_from=args.load_from,
        reporting=Reporting(args.report_to == "tensorboard", args.tracker_project_name, args.loss_report_name),
    )
    trainer.fit()
    publish_if_asked(args, trainer.work_dir, is_main=trainer.ranks.is_main)


if __name__ == "__main__":
    run_cli(main)
