"""What a run leaves behind when its last step is done: the adapter, and a card."""

from __future__ import annotations

from pathlib import Path

from diffusion.config import TrainConfig
from diffusion.training.lora import export_adapter
from diffusion.training.model_card import write_model_card
from diffusion.training.run_log import LOGGER
from diffusion.training.state import RunState, averaged_weights


def finish_run(work_dir: Path, config: TrainConfig, state: RunState) -> None:
    """Export an adapter (its average where there is one) and write the model card. Main rank only."""
    if config.lora is not None:
        if state.average is not None:
            with averaged_weights(state.network, state.average):
                export_adapter(state.network, config, work_dir)
        else:
            export_adapter(state.network, config, work_dir)
        LOGGER.info("adapter: %s", work_dir)
    LOGGER.info("model card: %s", write_model_card(work_dir, config, state.step, type(state.family).__name__))
