"""Command line shared by the programs that draw pictures. Nothing here imports torch, so --help is instant."""

from __future__ import annotations

import argparse

from diffusion.config.arguments import ArgumentParser

BUNDLED = "output/pretrained_models/emoji-256"
BUNDLED_LCM_LORA = "output/pretrained_models/emoji-256-lcm-lora"
HED = "output/pretrained_models/ControlNetHED.pth"
MEMORY_HELP = (
    "auto, full, 8gb (T5 in int8) or 4gb (T5 streamed, VAE in tiles): what is on the card when; auto looks at its "
    "free memory"
)


def sampling_parser(description: str | None, *, lcm: bool = False) -> ArgumentParser:
    """The parser of scripts/inference.py, or with `lcm` of scripts/inference_lcm.py.

    The flags of the original keep their names; --tokenizer_path is the VAE, as it is there.
    """
    parser = ArgumentParser(description=description)
    _add_model(parser.add_argument_group("model"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_picture(parser.add_argument_group("picture"))
    _add_control(parser.add_argument_group("ControlNet"))
    add = parser.add_argument_group("sampling").add_argument
    if lcm:
        add("--sample_steps", type=int, default=4, help="solver steps, 1 to 50; distilled models need 4 to 8")
        add("--cfg_scale", type=float, default=1.0, help="guidance; distillation has built it in, so 1 = none")
    else:
        add(
            "--sampling_algo",
            default="dpm-solver",
            help="dpm-solver, sa-solver, iddpm (ddpm), ddim, deis, lcm or flow-euler",
        )
        add("--step", type=int, default=-1, help="solver steps; -1 = the solver's usual number")
        add(
            "--cfg_scale",
            type=float,
            help="guidance, <= 1 is off; when absent the model's own (official: 4.5), and 1 for lcm",
        )
    add("--guidance_channels", type=int, help="latent channels that guidance acts on; all when absent, 3 = original")
    add("--null_caption", help="t5_empty, or stored; when absent stored for native official files, else t5_empty")
    add("--seed", type=int, default=0, help="of the first picture; picture k of all has seed + k")
    add("--bs", type=int, default=1, help="pictures at a time; does not change them")
    _add_speed(parser.add_argument_group("speed"))
    add = parser.add_argument_group("output").add_argument
    add("--output", help="folder of the pictures; when absent output/samples/NAME")
    add("--save_name", help="NAME of the folder in output/samples; when absent date, dataset, solver, steps, ...")
    add("--dataset", default="custom", help="a word for NAME")
    add("--grid", action="store_true", help="also write grid.png, all pictures labelled with their prompts")
    add("--preview", type=int, metavar="N", help="every N steps write preview.png, what is drawn so far")
    return parser


def _add_model(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--model_path", default=BUNDLED, help="diffusers pipeline folder, a checkpoint-N folder, or a weight file")
    add("--pipeline_load_from", default=BUNDLED, help="tokenizer, T5 and VAE for a model that has none")
    add("--t5_path", help="folder of T5 with its tokenizer, in place of the pipeline's")
    add("--tokenizer_path", help="folder of the VAE (the original's name for it), in place of the pipeline's")
    add("--lora", action="append", default=[], metavar="ADAPTER", help="LoRA folder, file or hub id; repeat for more")
    add("--lora_scale", type=float, action="append", default=[], help="strength of each --lora, or of all; absent = 1")
    add("--ema", action="store_true", help="use the averaged weights of a checkpoint")
    add("--memory", default="auto", help=MEMORY_HELP)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of T5 and transformer")
    add("--device", default="auto", help="cpu, cuda, mps; auto = cuda where there is one, else mps, else cpu")


def _add_speed(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--fast", action="store_true", help="on a card: compiled kernels, CUDA graphs, VAE in bfloat16 if the model is")
    add("--autotune", action="store_true", help="with --fast: try more kernels, which takes minutes once")
    add("--fp8", action="store_true", help="with --fast, lossy: large linear layers in 8-bit floating point")
    add("--guidance_until", type=float, metavar="SHARE", help="with --fast, lossy: guide this share of the steps alone")
    add("--reuse_every", type=int, metavar="N", help="with --fast, lossy: run all blocks in every N-th step only")


def _add_prompts(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--prompt", action="append", help="a prompt; repeat for several; instead of --txt_file")
    add("--txt_file", default="asset/samples.txt", help="one prompt a line, UTF-8; --ar 9:16 or --hw 512:768 in it")
    add("--negative_prompt", help="what guidance leads away from, in place of the null caption")
    add("--style", help="a style by name, e.g. Cinematic; a wrong name lists them")
    add(
        "--clean_caption",
        action=argparse.BooleanOptionalAction,
        help="clean prompts as the original did (default: for official alpha models)",
    )
    add("--num_images", type=int, default=1, help="pictures a prompt")


def _add_picture(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--image_size", type=int, help="px, height and width; the model's own when absent")
    add("--height", type=int, help="px, overrides --image_size")
    add("--width", type=int, help="px, overrides --image_size")
    add("--binning", action="store_true", help="draw the trained size nearest in ratio, then scale and cut")
    add("--image", help="a picture to begin from")
    add("--mask", help="a picture, white where --image is repainted; the rest keeps its pixels")
    add("--strength", type=float, help="0..1, share of the steps that repaint --image; when absent 0.6, with --mask 1")


def _add_control(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--control_image", help="a picture whose edges are followed; edges already, white on black, unless --hed")
    add("--controlnet", help="ControlNet file for the model; not needed where --model_path is a ControlNet file")
    add("--condition_strength", type=float, help="how closely, 0 = not at all; when absent 1, as trained")
    add("--hed", nargs="?", const=HED, metavar="FILE", help=f"find the edges with HED, by its weights; no FILE = {HED}")
