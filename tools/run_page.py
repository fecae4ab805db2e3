"""Show a training run in the browser while it goes on: curves, time left, validation grids.

    python tools/run_page.py output/emoji
    python tools/run_page.py output/emoji --port 8000 --host 0.0.0.0

Reads metrics.jsonl, config.json and validation/ of the run's folder; the run knows nothing of it.
"""

from __future__ import annotations

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", help="--work-dir of the run")
    parser.add_argument("--port", type=int, default=6007, help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines see it (%(default)s)")

    from diffusion.web.run_page import show_run

    show_run(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
