"""What a run leaves behind when its last step is done: the adapter, and a card."""

from __future__ import annotations

from pathlib import Path

from diffusion.config import TrainConfig
from diffusion.ranks import Ranks
from diffusion.training.lora import export_adapter
from diffusion.training.model_card import write_model_card
from diffusion.training.run_log import LOGGER
from diffusion.training.state import RunState, evaluated_network


def finish_run(work_dir: Path, config: TrainConfig, state: RunState, ranks: Ranks) -> None:
    """Export an adapter (its average where there is one) and write the model card; all ranks call it, one writes."""
    if config.lora is not None:
        with evaluated_network(state) as network:
            ranks.on_main(lambda: export_adapter(network, config, work_dir))
        LOGGER.info("adapter: %s", work_dir)
    card = ranks.on_main(lambda: write_model_card(work_dir, config, state.step, type(state.family).__name__))
    LOGGER.info("model card: %s", card)
