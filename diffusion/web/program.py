"""What the programs in app/ and the interfaces in scripts/ do, from parsed arguments to a page that is served."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch

from diffusion.errors import ConfigError
from diffusion.web.models import VARIANTS, Chosen, Variant, choose, choose_lcm, make_artist
from diffusion.web.settings import WebSettings, read_settings


def show(args: argparse.Namespace, variant: str | None = None) -> None:
    """Run a page until it is interrupted.

    Args:
        variant: of `VARIANTS`; None = as APP_CONTEXT says, else "1024".
    Raises:
        PixArtError: an argument, environment variable, file or model that cannot be used.
    """
    name = variant or os.environ.get("APP_CONTEXT", "1024").upper() or "1024"
    if name not in VARIANTS:
        raise ConfigError(f"APP_CONTEXT={name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    pick = choose_lcm if hasattr(args, "is_lora") else choose
    _serve(args, replace(VARIANTS[name], image_size=args.image_size), pick)


def show_interface(args: argparse.Namespace) -> None:
    """Run scripts/interface.py: the same page, for any model, on the original's port."""
    pick = choose
    _serve(args, replace(VARIANTS["1024"], image_size=args.image_size), pick, default_port=7788)


def show_controlnet(args: argparse.Namespace, *, default_port: int = 15432) -> None:
    """Run app/app_controlnet.py or scripts/interface_controlnet.py: the page with a ControlNet."""
    variant = VARIANTS["CONTROLNET"]
    if args.config is not None and args.image_size is None:
        from diffusion.config import load_config

        args.image_size = load_config(args.config).image_size
    if hasattr(args, "sampling_algo"):
        from diffusion.inference.solvers import algorithm_name

        variant = replace(
            variant,
            solver=algorithm_name(args.sampling_algo),
            steps=args.num_sampling_steps,
            guidance_scale=args.cfg_scale,
            control_strength=args.condition_strength,
        )
    _serve(args, replace(variant, image_size=args.image_size), choose, default_port=default_port)


def _serve(
    args: argparse.Namespace,
    variant: Variant,
    pick: Callable[..., tuple[Chosen, Variant]],
    *,
    default_port: int = 15432,
) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pixart.web").setLevel(logging.INFO)
    settings = read_settings(args, os.environ, default_port=default_port, on_card=torch.cuda.is_available())
    chosen, beginning = pick(args, variant, fetch=settings.fetch)
    with tempfile.TemporaryDirectory(prefix="pixart-web-") as uploads:
        # Before gradio is imported: uploads lie in a folder of this program's own, gone when it ends.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        run(args, chosen, beginning, settings)


def run(args: argparse.Namespace, chosen: Chosen, variant: Variant, settings: WebSettings) -> None:
    """Load the model, build the page and serve it."""
    try:
        from diffusion.web.engine import Engine
        from diffusion.web.examples import examples_of
        from diffusion.web.page import build_page
        from diffusion.web.server import build_app, serve
    except ImportError as error:
        raise ConfigError(f"the page needs {error.name}; install it with: pip install -e '.[app]'") from error
    engine = Engine(lambda: make_artist(args, chosen, settings, few_steps=variant.solver == "lcm"), settings)
    examples = examples_of(engine.artist, settings.output, draw=settings.cache_examples)
    app = build_app(build_page(engine, variant, chosen.notice, examples), engine)
    engine.start()
    try:
        serve(app, settings, lambda line: print(line, flush=True))
    finally:
        engine.close()
