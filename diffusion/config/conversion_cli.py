"""Command line shared by the conversion tools; needs no torch, so --help is instant."""

from __future__ import annotations

import argparse

from diffusion.config.arguments import ArgumentParser

DTYPES = ("float32", "bfloat16", "float16")
PARTS_HELP = (
    "pipeline folder or hub id that gives tokenizer, T5, VAE and scheduler (default: the official one of the version)"
)


def boolean(text: str) -> bool:
    """`True`/`False` as the original's commands write them; the original took every text, "False" too, for true."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def conversion_parser(description: str | None) -> ArgumentParser:
    """Flags of both converters to diffusers: those of PixArt-alpha's tool and those of PixArt-Sigma's."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument_group("files").add_argument
    add("--orig_ckpt_path", required=True, help="native .pth or safetensors file, or any other checkpoint")
    add("--dump_path", required=True, help="new folder; the network goes to DUMP_PATH/transformer")
    add = parser.add_argument_group("what is written").add_argument
    add("--only_transformer", type=boolean, default=True, help="False: a whole pipeline (default: True)")
    add("--ema", action="store_true", help="convert state_dict_ema, the averaged weights")
    add("--dtype", choices=DTYPES, help="of the written weights (default: as in the file)")
    add("--pipeline_load_from", help=f"with --only_transformer=False: {PARTS_HELP}")
    add(
        "--single_file",
        help="also write one safetensors file in native names with ModelSpec metadata, as ComfyUI reads",
    )
    add = parser.add_argument_group("what the file is, checked against it").add_argument
    add("--image_size", type=int, help="training size in px, checked against the file; needed when it does not tell")
    add("--multi_scale_train", type=boolean, help="checked against the file: True wants size conditions at 1024 px")
    add("--micro_condition", action="store_true", help="checked against the file: it must have size conditions")
    add("--qk_norm", action="store_true", help="checked against the file")
    add("--kv_compress", action="store_true", help="checked against the file")
    add("--version", choices=("alpha", "sigma"), help="for files that do not tell; most do")
    add("--num_heads", type=int, help="attention heads of a native file with a width of its own")
    parser.set_defaults(untold_image_size=None, untold_family=None)
    return parser


def pipeline_parser(description: str | None) -> ArgumentParser:
    """Flags of PixArt-Sigma's tool from one file of weights to a pipeline; `convert_by_flags` reads them too."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--safetensors_path",
        dest="orig_ckpt_path",
        required=True,
        metavar="SAFETENSORS_PATH",
        help="weights in diffusers' names, or any other checkpoint",
    )
    add("--output_folder", dest="dump_path", required=True, metavar="OUTPUT_FOLDER", help="new folder of the pipeline")
    add(
        "--image_size",
        type=int,
        help="training size in px, checked against a file that tells it (default: as the file tells, else 512)",
    )
    add("--version", choices=("alpha", "sigma"), help="for files that do not tell (default: sigma)")
    add("--pipeline_load_from", help=PARTS_HELP)
    add("--dtype", choices=DTYPES, help="of the transformer's weights (default: as in the file)")
    add("--num_heads", type=int, help="attention heads of a file with a width of its own")
    add("--multistep", type=boolean, default=True, help="accepted; the original never read it")
    parser.set_defaults(
        only_transformer=False,
        single_file=None,
        ema=False,
        multi_scale_train=None,
        micro_condition=False,
        qk_norm=False,
        kv_compress=False,
        untold_image_size=512,  # the original's default; it knew Sigma alone
        untold_family="sigma",
    )
    return parser
