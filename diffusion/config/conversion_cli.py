"""Command line shared by the conversion tools; needs no torch, so --help is instant."""

from __future__ import annotations

import argparse

from diffusion.config.arguments import ArgumentParser

DTYPES = ("float32", "bfloat16", "float16")


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
    add(
        "--pipeline_load_from",
        help="pipeline folder or hub id that gives tokenizer, T5, VAE and scheduler to --only_transformer=False "
        "(default: the official one of the version)",
    )
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
    return parser
