"""Command line of the pages that draw in a browser. Nothing here imports torch or gradio, so --help is instant."""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import BUNDLED, HED, MEMORY_HELP

ENVIRONMENT_HELP = """
environment variables:
  DEMO_PORT, DEMO_HOST      where the page listens; 127.0.0.1 = this machine alone, 0.0.0.0 = everybody who reaches it
  DEMO_AUTH                 user:password, or several with commas; the page then asks for one of them
  DEMO_OUTPUT               folder of the pictures (output/online_demo_img)
  DEMO_KEEP_PICTURES        as many of the newest stay there (1000)
  DEMO_QUEUE_SIZE           requests that may wait (20); DEMO_QUEUE_PER_USER: of one user (4)
  DEMO_MAX_UPLOAD_MB        largest picture that is taken (20)
  DEMO_LOG_PROMPTS=1        write prompts into the log; without it their length alone
  DEMO_METRICS=1            answer /metrics to other machines too
  DEMO_FETCH=1              official files that are not on this machine come from the hub; auto = where there is a card
  MAX_IMAGE_SIZE            longest side in px (2048 on a card, else 1024)
  CACHE_EXAMPLES=1          draw the example pictures of an official model at its first start
  USE_TORCH_COMPILE=1       compile the network; ENABLE_CPU_OFFLOAD=1: parts wait in host memory (CUDA)
  CONSISTENCY_DECODER=1     decode with openai/consistency-decoder
  SHOW_DUPLICATE_BUTTON=1   on a hosted Space, offer to duplicate it
  APP_CONTEXT               1024, 512, LCM or CONTROLNET: what app/app.py shows
"""


def app_parser(description: str | None) -> ArgumentParser:
    """The parser of app/app.py and app/app_512.py, which the other pages extend."""
    parser = ArgumentParser(
        description=description,
        epilog=ENVIRONMENT_HELP,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model_path", help="pipeline folder, checkpoint-N or weight file; when absent the page's official model")
    add("--pipeline_load_from", default=BUNDLED, help="tokenizer, T5 and VAE for a model that has none (%(default)s)")
    add("--t5_path", help="folder of T5 with its tokenizer, in place of the pipeline's")
    add("--tokenizer_path", help="folder of the VAE (the original's name for it), in place of the pipeline's")
    add("--lora_dir", default="output/loras", help="folder of LoRA adapters to choose from (%(default)s)")
    add("--image_size", type=int, help="px, height and width at first; the model's own when absent")
    add("--memory", default="auto", help=MEMORY_HELP)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of T5 and transformer")
    add("--device", default="auto", help="cpu, cuda, mps; auto = cuda where there is one, else mps, else cpu")
    add = parser.add_argument_group("page").add_argument
    add("--port", type=int, help="when absent DEMO_PORT, else 15432")
    add("--host", help="when absent DEMO_HOST, else 127.0.0.1")
    parser.set_defaults(controlnet=None, hed=None)
    return parser


def lcm_app_parser(description: str | None) -> ArgumentParser:
    """The parser of app/app_lcm.py."""
    parser = app_parser(description)
    add = parser.add_argument
    add("--is_lora", action="store_true", help="an ordinary model with an LCM-LoRA, instead of a distilled model")
    add("--repo_id", help="the distilled model, a folder or hub name, or with --is_lora the ordinary one")
    add("--lora_repo_id", default="PixArt-alpha/PixArt-LCM-LoRA-XL-2-1024-MS", help="folder or hub name (%(default)s)")
    return parser


def controlnet_app_parser(description: str | None) -> ArgumentParser:
    """The parser of app/app_controlnet.py."""
    parser = app_parser(description)
    add = parser.add_argument
    add("config", nargs="?", help="a config, for its image_size")
    add("--controlnet", help="ControlNet file; when absent the official one for the model")
    add("--hed", help=f"weights that find edges; when absent {HED} where it exists")
    return parser


def interface_parser(description: str | None) -> ArgumentParser:
    """The parser of scripts/interface.py."""
    parser = app_parser(description)
    parser.add_argument("--llm_model", default="t5", choices=("t5",), help="text encoder (%(default)s)")
    return parser


def interface_controlnet_parser(description: str | None) -> ArgumentParser:
    """The parser of scripts/interface_controlnet.py."""
    parser = controlnet_app_parser(description)
    add = parser.add_argument
    add("--llm_model", default="t5", choices=("t5",), help="text encoder (%(default)s)")
    add("--num_sampling_steps", type=int, default=14, help="at first (%(default)s)")
    add("--cfg_scale", type=float, help="guidance at first; the model's own when absent (official: 4.5)")
    add("--sampling_algo", default="dpm-solver", help="at first (%(default)s)")
    add("--condition_strength", type=float, default=1.0, help="at first (%(default)s)")
    return parser
