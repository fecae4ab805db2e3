from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from diffusion.checkpoints import load_transformer
from diffusion.config.app_cli import app_parser, controlnet_app_parser, lcm_app_parser
from diffusion.errors import ConfigError
from diffusion.web.models import VARIANTS, choose, choose_lcm, make_artist
from diffusion.web.server import listen, start_line
from diffusion.web.settings import WebSettings, read_settings
from tests.checkpoints.hub_server import running_hub
from tests.doors import Door

ROOT = Path(__file__).parents[2]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(monkeypatch, capsys)


def settings(*arguments: str, **environ: str) -> WebSettings:
    return read_settings(app_parser(None).parse_args(arguments), environ)


def test_this_machine_alone_by_default() -> None:
    chosen = settings()
    assert (chosen.host, chosen.port, chosen.auth, chosen.log_prompts) == ("127.0.0.1", 15432, (), False)
    line = start_line(chosen, 15432)
    assert "http://127.0.0.1:15432" in line and "DEMO_HOST=0.0.0.0 opens it" in line


def test_demo_host_opens_it_and_the_start_line_says_so() -> None:
    opened = settings(DEMO_HOST="0.0.0.0", DEMO_PORT="12345")
    assert opened.port == 12345
    assert "open to everybody" in start_line(opened, 12345) and "DEMO_AUTH" in start_line(opened, 12345)
    assert "with a login" in start_line(settings(DEMO_HOST="0.0.0.0", DEMO_AUTH="me:secret"), 1)
    assert "secret" not in start_line(settings(DEMO_HOST="0.0.0.0", DEMO_AUTH="me:secret"), 1)


def test_arguments_come_first() -> None:
    chosen = settings("--port", "1", "--host", "::1", DEMO_PORT="2", DEMO_HOST="0.0.0.0")
    assert (chosen.host, chosen.port, chosen.is_local) == ("::1", 1, True)


def test_when_official_files_are_fetched() -> None:
    assert settings().fetch is False and settings(DEMO_FETCH="1").fetch is True
    args = app_parser(None).parse_args([])
    assert [read_settings(args, {"DEMO_FETCH": "auto"}, on_card=card).fetch for card in (False, True)] == [False, True]


def test_a_space_is_open_behind_its_proxy() -> None:
    chosen = settings(SPACE_ID="me/pixart")
    assert (chosen.host, chosen.port, chosen.behind_proxy) == ("0.0.0.0", 7860, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEMO_PORT", "many"), ("DEMO_PORT", "70000"), ("DEMO_AUTH", "secret"), ("DEMO_AUTH", "me:"),
        ("DEMO_QUEUE_SIZE", "0"), ("MAX_IMAGE_SIZE", "-5"), ("DEMO_LOG_PROMPTS", "yes"),
    ],
)  # fmt: skip
def test_wrong_variables_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        settings(**{name: value})


def test_a_port_that_is_taken_is_said() -> None:
    taken = listen("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match="DEMO_PORT"):
            listen("127.0.0.1", taken.getsockname()[1])
    finally:
        taken.close()


def test_the_official_model_is_taken_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.web.models.ROOT", tmp_path)
    args = app_parser(None).parse_args([])
    chosen, _beginning = choose(args, VARIANTS["1024"])
    assert chosen.model.endswith("emoji-256") and "tools/download.py" in chosen.notice
    (tmp_path / "PixArt-XL-2-1024-MS.pth").touch()
    assert choose(args, VARIANTS["1024"])[0].model.endswith("emoji-256")  # its T5 and VAE are not there
    (tmp_path / "t5_ckpts").mkdir()
    (tmp_path / "sd-vae-ft-ema").mkdir()
    native = choose(args, VARIANTS["1024"])[0]
    assert native.model.endswith(".pth") and native.options["text_encoder"] == str(tmp_path / "t5_ckpts")
    (tmp_path / "PixArt-XL-2-1024-MS").mkdir()
    chosen, _ = choose(args, VARIANTS["1024"])
    assert (chosen.model, chosen.notice) == (str(tmp_path / "PixArt-XL-2-1024-MS"), "")


def test_official_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched only when that is wanted; from the cache without a network; a download that was cut off is none."""
    monkeypatch.setattr("diffusion.web.models.ROOT", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    weights = save({"weight": torch.zeros(1)})
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    files = {
        "model_index.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": weights,
        "vae/diffusion_pytorch_model.safetensors": weights,
        "text_encoder/model.safetensors.index.json": index,
        "text_encoder/model-00001-of-00002.safetensors": weights,
        "text_encoder/model-00002-of-00002.safetensors": weights,
    }
    control = {"PixArt-XL-2-1024-ControlNet.pth": b"x"}
    args, variant = controlnet_app_parser(None).parse_args([]), VARIANTS["CONTROLNET"]
    repositories = {"PixArt-alpha/PixArt-XL-2-1024-MS": files, "PixArt-alpha/PixArt-ControlNet": control}
    with running_hub(repositories) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert choose(args, variant)[0].model.endswith("emoji-256")
        chosen = choose(args, variant, fetch=True)[0]
        assert "PixArt-XL-2-1024-MS" in chosen.model and Path(chosen.options["controlnet"]).read_bytes() == b"x"
        assert "ControlNetHED.pth" in chosen.notice and chosen.options["edge_detector"] is None
        (Path(chosen.model) / "text_encoder/model-00002-of-00002.safetensors").unlink()
        assert choose(args, variant)[0].model.endswith("emoji-256")
        choose(args, variant, fetch=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = choose(args, variant)[0]
    assert (again.model, again.options["controlnet"]) == (chosen.model, chosen.options["controlnet"])
    missing = choose(app_parser(None).parse_args([]), VARIANTS["512"], fetch=True)[0]
    assert missing.model.endswith("emoji-256") and "could not be reached" in missing.notice


def test_lcm_begins_with_four_steps_only_where_the_model_is_distilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.web.models.ROOT", tmp_path)
    args = lcm_app_parser(None).parse_args([])
    chosen, beginning = choose_lcm(args, VARIANTS["LCM"])
    assert (beginning.solver, beginning.steps) == ("lcm", 4)
    assert chosen.model.endswith("emoji-256") and (ROOT / str(chosen.lora) / "adapter_config.json").is_file()
    monkeypatch.setattr("diffusion.web.models.BUNDLED_LCM_LORA", str(tmp_path / "absent"))
    assert choose_lcm(args, VARIANTS["LCM"])[1].solver == "dpm-solver"
    (tmp_path / "PixArt-LCM-XL-2-1024-MS").mkdir()
    beginning = choose_lcm(args, VARIANTS["LCM"])[1]
    assert (beginning.solver, beginning.steps, beginning.guidance_scale) == ("lcm", 4, 1.0)


def test_the_lora_of_a_model_is_fused_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.web.models.ROOT", tmp_path)
    args = lcm_app_parser(None).parse_args(["--device", "cpu"])
    chosen, _ = choose_lcm(args, VARIANTS["LCM"])
    network = make_artist(args, chosen, settings(), few_steps=True).pipeline.transformer
    base = load_transformer(chosen.model).state_dict()
    assert network.state_dict().keys() == base.keys()  # a plain network, as every memory plan and step wants it
    assert not torch.equal(network.state_dict()["blocks.0.mlp.fc1.weight"], base["blocks.0.mlp.fc1.weight"])


def test_a_space_installs_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = (ROOT / "app/space/requirements.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == [
        *project["dependencies"],
        *project["optional-dependencies"]["app"],
    ]
    header = (ROOT / "app/space/README.md").read_text().split("---")[1]
    assert "sdk: gradio" in header and "app_file: app.py" in header


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("app/app.py", ["--model_path", "DEMO_HOST"]),
        ("app/app_512.py", ["--port"]),
        ("app/app_lcm.py", ["--is_lora", "--lora_repo_id"]),
        ("app/app_controlnet.py", ["--controlnet", "config"]),
        ("scripts/interface.py", ["--llm_model", "--tokenizer_path"]),
        ("scripts/interface_controlnet.py", ["--num_sampling_steps", "--condition_strength"]),
        ("tools/run_page.py", ["work_dir", "--port"]),
    ],
)
def test_help_of_the_programs(door: Door, program: str, words: list[str]) -> None:
    done = door(program, "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in words)


def test_mistakes_are_one_line(door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMO_PORT", "many")
    done = door("app/app.py")
    assert done.returncode == 2 and done.stderr.startswith("error: DEMO_PORT='many'") and done.stderr.count("\n") == 1
    monkeypatch.setenv("DEMO_PORT", "0")
    monkeypatch.setenv("APP_CONTEXT", "4096")
    assert "APP_CONTEXT='4096'" in door("app/app.py").stderr
    done = door("tools/run_page.py", tmp_path)
    assert done.returncode == 2 and "--work-dir" in done.stderr
