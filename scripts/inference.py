"""Draw pictures from prompts.

    python scripts/inference.py --prompt "red apple" --num_images 4 --grid
    python scripts/inference.py --txt_file asset/samples.txt --model_path output/run/checkpoint-2000 --ema

Each PNG carries prompt, seed, solver, steps, guidance and model fingerprint in its metadata.
"""

from __future__ import annotations

import argparse
import time

from diffusion.errors import run_cli

BUNDLED = "output/pretrained_models/emoji-256"


def build_parser() -> argparse.ArgumentParser:
    """Command-line arguments; importing this needs no torch."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--model_path", default=BUNDLED, help="diffusers pipeline folder, or a checkpoint-N folder of a run")
    add("--pipeline_load_from", default=BUNDLED, help="tokenizer, T5 and VAE for a checkpoint that has none")
    add("--ema", action="store_true", help="use the averaged weights of a checkpoint")
    add("--prompt", action="append", help="a prompt; repeat for several; instead of --txt_file")
    add("--txt_file", default="asset/samples.txt", help="one prompt a line, UTF-8")
    add("--negative_prompt", help="what guidance leads away from, in place of the null caption")
    add("--num_images", type=int, default=1, help="pictures a prompt; picture k of all has seed + k")
    add("--image_size", type=int, help="px, height and width; the model's own when absent")
    add("--height", type=int, help="px, overrides --image_size")
    add("--width", type=int, help="px, overrides --image_size")
    add("--bs", type=int, default=1, help="pictures at a time; does not change them")
    add("--sampling_algo", default="dpm-solver", help="dpm-solver, sa-solver, iddpm (ddpm), ddim or lcm")
    add("--step", type=int, default=-1, help="solver steps; -1 = the solver's usual number")
    add("--cfg_scale", type=float, help="guidance, <= 1 is off; when absent 4.5, and 1 for lcm")
    add("--seed", type=int, default=0)
    add("--null_caption", default="t5_empty", help="t5_empty, or stored (native official weights)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of T5 and transformer")
    add("--device", default="auto", help="cpu, cuda, ...; auto = cuda where there is one")
    add("--output", help="folder of the pictures; when absent output/samples/NAME")
    add("--save_name", help="NAME of the folder in output/samples; when absent date, solver, steps, guidance, seed")
    add("--grid", action="store_true", help="also write grid.png, all pictures labelled with their prompts")
    return parser


def main() -> None:
    args = build_parser().parse_args()

    import torch

    from diffusion.devices import choose_device
    from diffusion.inference import DEFAULT_STEPS
    from diffusion.inference.batch import load_pipeline, read_prompts, sample_to_folder
    from diffusion.inference.solvers import algorithm_name

    algorithm = algorithm_name(args.sampling_algo)
    steps = DEFAULT_STEPS[algorithm] if args.step == -1 else args.step
    scale = args.cfg_scale if args.cfg_scale is not None else (1.0 if algorithm == "lcm" else 4.5)
    prompts = args.prompt or read_prompts(args.txt_file)
    device = choose_device(args.device)
    pipeline = load_pipeline(
        args.model_path,
        args.pipeline_load_from,
        algorithm=algorithm,
        ema=args.ema,
        device=device,
        torch_dtype=getattr(torch, args.dtype),
    )
    pipeline.set_progress_bar_config(disable=None, leave=False)
    name = args.save_name or f"{time.strftime('%Y-%m-%d')}_{algorithm}_step{steps}_scale{scale:g}_seed{args.seed}"
    folder = args.output or f"output/samples/{name}"
    started = time.perf_counter()
    paths, grid = sample_to_folder(
        pipeline,
        prompts,
        folder,
        model=args.model_path,
        seed=args.seed,
        batch_size=args.bs,
        num_images=args.num_images,
        grid=args.grid,
        settings={
            "negative_prompt": args.negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "height": args.image_size if args.height is None else args.height,
            "width": args.image_size if args.width is None else args.width,
            "null_caption": args.null_caption,
        },
    )
    seconds = time.perf_counter() - started
    print(f"{len(paths)} pictures in {seconds:.1f} s ({seconds / len(paths):.2f} s each) are in {folder}")
    if grid is not None:
        print(f"grid: {grid}")


if __name__ == "__main__":
    run_cli(main)
