"""Arguments of the captioning program: those that the original's README shows, and ours.

Nothing here imports torch, so --help is instant.
"""

from __future__ import annotations

from pathlib import Path

from diffusion.config.arguments import ArgumentParser

# The original's liuhaotian/LLaVA-Lightning-MPT-7B-preview needs code that transformers does not have.
DEFAULT_CAPTIONER = "llava-hf/llava-1.5-7b-hf"
PROMPTS = ("auto", "describe", "refine")


def captioning_parser(description: str | None) -> ArgumentParser:
    """Arguments of `tools/VLM_caption_lightning.py`."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument_group("pictures").add_argument
    add("--output", type=Path, required=True, help="folder of NAME.txt, captions.json and rejected.jsonl")
    add("--data-root", type=Path, default=Path("."), help="folder of the pictures (default: %(default)s)")
    add(
        "--index", type=Path,
        help="JSON list of path and prompt, or text file of one picture a line (default: all pictures in --data-root, "
        "with the text beside each as its prompt)",
    )  # fmt: skip
    add = parser.add_argument_group("captioner").add_argument
    add(
        "--model-path", default=DEFAULT_CAPTIONER,
        help="image-text model of transformers, a folder or a hub id (default: %(default)s)",
    )  # fmt: skip
    add(
        "--prompt", choices=PROMPTS, default="auto",
        help="describe the picture, refine the caption it has, or auto: refine where there is one "
        "(default: %(default)s)",
    )  # fmt: skip
    add("--instruction", help="own instruction instead; {caption} stands for the caption that the picture has")
    add(
        "--template",
        help="text around {instruction} for a model without a chat template, such as 'USER: <image> {instruction} "
        "ASSISTANT:'; empty for a captioner that takes no instruction",
    )  # fmt: skip
    add("--temperature", type=float, default=0.2, help="of sampling; 0 takes the likeliest (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--max-new-tokens", type=int, default=512, help="of a caption (default: %(default)s)")
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=int, default=32, help="pictures a call (default: %(default)s)")
    add("--limit", type=int, help="first so many pictures")
    add(
        "--max-rejected", type=float, default=0.01,
        help="largest share of unusable pictures; one is always allowed, unless 0 (default: %(default)s)",
    )  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: %(default)s")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    return parser
