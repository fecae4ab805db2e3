"""Draw the example pictures that the page of app/app.py shows with the bundled model.

    python tools/draw_app_examples.py

Run it again after the bundled model has changed: pictures of another model are not shown.
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.config.sampling_cli import BUNDLED
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default=BUNDLED, help="pipeline folder (%(default)s)")
    args = parser.parse_args()

    from diffusion.web.examples import ship_examples

    print(f"examples: {ship_examples(args.model_path)}")


if __name__ == "__main__":
    run_cli(main)
