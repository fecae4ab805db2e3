"""Model cards of runs that train whole networks, and uploads to a hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffusion.config import load_config
from diffusion.errors import CheckpointError, ConfigError
from diffusion.training.model_card import write_model_card
from diffusion.training.publishing import publish, require_account
from tests.training.tiny_run import run
from tests.training.upload_hub import TOKEN, running_upload_hub


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.tiny_run import write_config

    folder = tmp_path_factory.mktemp("finished")
    options = ["max_steps=2", f"load_from={str(parts / 'pipe')!r}", "hidden_size=32", "num_heads=2", "depth=1"]
    config = load_config(write_config(folder / "config.py", parts), options, notify=lambda line: None)
    run(config, folder / "my-run")
    return folder / "my-run"


def front_matter(text: str) -> dict:  # type: ignore[type-arg]
    return yaml.safe_load(text.removeprefix("---\n").split("\n---\n", 1)[0])


def test_every_run_ends_with_a_card(finished: Path) -> None:
    text = (finished / "README.md").read_text()
    head = front_matter(text)
    assert (head["base_model"], head["base_model_relation"]) == ("pipe", "finetune")
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image"
    assert head["tags"] == ["text-to-image", "pixart", "diffusers", "diffusers-training"]
    assert text.count("# my-run") == 1
    assert "| training loss, mean of the last tenth of the log |" in text
    assert "| validation loss, first and last |" in text
    assert "PixArtTransformer2DModel.from_pretrained" in text


def test_the_licence_is_the_base_models(finished: Path, tmp_path: Path) -> None:
    from diffusion.config import TrainConfig

    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: openrail++\ntags: []\n---\n# base\n")
    config = TrainConfig.from_json((finished / "config.json").read_text()).model_copy(update={"load_from": str(base)})
    text = write_model_card(finished, config, 2).read_text()
    assert front_matter(text)["license"] == "openrail++"
    assert "Licence: openrail++, that of the base model." in text


def test_the_average_is_that_of_the_family(finished: Path) -> None:
    from diffusion.config import TrainConfig

    config = TrainConfig.from_json((finished / "config.json").read_text())
    config = config.model_copy(update={"ema_rate": 0.9999, "ema_decay": 0.95})
    assert "| EMA | 0.95 |" in write_model_card(finished, config, 2, "LCM").read_text()
    assert "| EMA |" not in write_model_card(finished, config, 2, "LCMLoRA").read_text()
    assert "| EMA | 0.9999 |" in write_model_card(finished, config, 2).read_text()


def test_every_dreambooth_run_is_tagged(finished: Path) -> None:
    from diffusion.config import TrainConfig

    config = TrainConfig.from_json((finished / "config.json").read_text())
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompt": ("sks dog",)})})
    assert "dreambooth" in front_matter(write_model_card(finished, config, 2).read_text())["tags"]


def test_upload(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_upload_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert require_account(TOKEN) == "someone"
        address = publish(finished, "my-run", token=TOKEN)
        assert address == f"{hub.address}/someone/my-run"
        files = hub.files["someone/my-run"]
        assert files["README.md"] == (finished / "README.md").read_bytes()
        weights = "transformer/diffusion_pytorch_model.safetensors"
        averaged = finished / "checkpoints/checkpoint-2/transformer_ema"
        assert files[weights] == (averaged / Path(weights).name).read_bytes()
        assert set(files) == {"README.md", "config.json", "transformer/config.json", weights}


def test_refused_accounts_and_empty_folders(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_upload_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        with pytest.raises(ConfigError, match=r"--push_to_hub: no account on http.*token.*run `hf auth login`"):
            require_account("wrong")
        with pytest.raises(CheckpointError, match=r"could not be uploaded .*the run itself is whole in"):
            publish(finished, "my-run", token="wrong")
        with pytest.raises(CheckpointError, match=r"holds no checkpoint and no adapter to upload"):
            publish(tmp_path, "my-run", token=TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match=r"no account on http.*refused"):
        require_account(TOKEN)
