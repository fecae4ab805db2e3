"""Make the weight average of any length after training, from the snapshots of a run (arXiv:2312.02696).

    python tools/posthoc_ema.py output/emoji --sigma_rel 0.08 --output output/emoji/average-0.08
    python scripts/inference.py --model_path output/emoji/average-0.08

The run's config needs posthoc_ema=dict(snapshot_every_steps=...). OUTPUT is a transformer folder that diffusers opens.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path, help="folder of the run")
    parser.add_argument(
        "--sigma_rel", type=float, required=True, help="length of the average as a share of the training, in (0, 0.288)"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder of the averaged transformer")
    parser.add_argument("--step", type=int, help="optimiser step at which the average ends (default: last snapshot)")
    args = parser.parse_args()

    from diffusion.training.posthoc_snapshots import reconstruct

    made = reconstruct(args.work_dir, args.sigma_rel, args.output, step=args.step)
    print(
        f"{args.output}: average with sigma_rel {args.sigma_rel} at step {made.step} from {made.num_averages} stored "
        f"averages; error of its profile {made.relative_error:.2%}"
    )


if __name__ == "__main__":
    run_cli(main)
