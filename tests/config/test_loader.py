"""Loading: inheritance, overrides, ignored keys, and files that cannot be read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from diffusion.config import ConfigError, TrainConfig, config_from_json, load_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.py"))
SMALL = 'data = dict(type="Store", root="features")\n'


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path, *overrides: str) -> str:
    """The message of the ConfigError, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, notify=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def quiet(path: Path, *overrides: str) -> TrainConfig:
    return load_config(path, overrides, notify=lambda line: None)


def test_the_originals_config_names_exist() -> None:
    names = {str(path.relative_to(REPOSITORY / "configs")) for path in CONFIGS}
    stages = (
        "256_SAM",
        "256_internal",
        "512_internal",
        "512_internalms",
        "1024_internal",
        "1024_internalms",
        "1024_lcm",
    )
    assert {f"pixart_config/PixArt_xl2_img{stage}.py" for stage in stages} <= names
    apps = ("1024_dreambooth", "1024_controlHed", "512_controlHed")
    assert {f"pixart_app_config/PixArt_xl2_img{app}.py" for app in apps} <= names
    assert {"PixArt_xl2_internal.py", "PixArt_xl2_sam.py", "emoji/emoji_256.py", "emoji/emoji_demo.py"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is_for(path: Path) -> None:
    config = quiet(path)
    assert TrainConfig.from_json(config.to_json()) == config
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(word in header for word in ("# Purpose:", "# Data:", "# Batch", "ardware"))


def test_values_of_the_original_table() -> None:
    folder = REPOSITORY / "configs"
    base = quiet(folder / "PixArt_xl2_internal.py")
    assert (base.data_root, base.data.root, base.train_batch_size) == ("/data/data", "images", 32)
    assert (base.mixed_precision, base.seed, base.ema_rate, base.scale_factor) == ("fp16", 43, 0.9999, 0.18215)
    assert (base.optimizer.lr, base.optimizer.weight_decay, base.optimizer.eps) == (1e-4, 3e-2, 1e-10)
    sam = quiet(folder / "pixart_config/PixArt_xl2_img256_SAM.py")
    assert (sam.model, sam.train_batch_size, sam.gradient_clip, sam.num_workers) == ("PixArt_XL_2", 176, 0.01, 10)
    assert sam.data.image_list_txt == tuple(f"part{index}.txt" for index in range(32))
    assert (sam.lr_schedule_args.num_warmup_steps, sam.save_model_steps, sam.optimizer.lr) == (1000, 20000, 2e-5)
    large = quiet(folder / "pixart_config/PixArt_xl2_img1024_internalms.py")
    assert (large.model, large.aspect_ratio_type, large.multi_scale) == ("PixArtMS_XL_2", "ASPECT_RATIO_1024", True)
    assert (large.lewei_scale, large.pe_interpolation, large.num_epochs) == (2.0, 2.0, 10)
    lcm = quiet(folder / "pixart_config/PixArt_xl2_img1024_lcm.py")
    assert (lcm.loss_type, lcm.huber_c, lcm.cfg_scale, lcm.class_dropout_prob) == ("huber", 1e-3, 4.5, 0.0)
    control = quiet(folder / "pixart_app_config/PixArt_xl2_img512_controlHed.py")
    assert (control.copy_blocks_num, control.train_ratio, control.gradient_accumulation_steps) == (13, 0.1, 4)
    dreambooth = quiet(folder / "pixart_app_config/PixArt_xl2_img1024_dreambooth.py")
    assert (dreambooth.data.prompt, dreambooth.auto_lr) == (("a photo of sks dog",), None)


def test_inheritance_merges_and_delete_replaces(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "base.py", SMALL + "optimizer = dict(type='AdamW', lr=3e-4, eps=1e-6)\nseed = 7\n")
    child = write(tmp_path / "deep", "child.py", "_base_ = '../base.py'\noptimizer = dict(lr=1e-5)\n")
    config = quiet(child)
    assert (config.optimizer.lr, config.optimizer.eps, config.seed) == (1e-5, 1e-6, 7)
    child.write_text("_base_ = ['../base.py']\noptimizer = dict(_delete_=True, type='SGD', lr=1e-5)\n")
    assert quiet(child).optimizer.eps is None


def test_a_config_may_compute_with_helpers(tmp_path: Path) -> None:
    text = "import math\nfrom math import sqrt\n_batch = 8\ndef half(x):\n    return x // 2\n"
    config = quiet(write(tmp_path, "c.py", text + SMALL + "train_batch_size = half(_batch) * int(sqrt(4))\n"))
    assert config.train_batch_size == 8


def test_base_values_can_be_used_in_the_child(tmp_path: Path) -> None:
    write(tmp_path, "base.py", SMALL + "seed = 7\n")
    child = write(tmp_path, "child.py", "_base_ = ['base.py']\nlog_interval = {{_base_.seed}}\n")
    assert quiet(child).log_interval == 7


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.betas=[0.8,0.9]", "optimizer.betas", (0.8, 0.9)),
        ("num_epochs=3", "num_epochs", 3),
        ("ema_rate=None", "ema_rate", None),
        ("use_fsdp=true", "use_fsdp", True),
        ("load_from=a=b", "load_from", "a=b"),
        ("work_dir='12'", "work_dir", "12"),
        ("gradient_clip=2", "gradient_clip", 2.0),
        ("auto_lr.rule=linear", "auto_lr.rule", "linear"),
        ("resume_from=latest", "resume_from.checkpoint", "latest"),
        ("resume_from.load_ema=True", "resume_from.load_ema", True),
        ("pe_interpolation=0.5", "lewei_scale", 0.5),
        ("validation_prompts=['cat']", "validation.prompts", ("cat",)),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: str, value: object) -> None:
    item: object = quiet(write(tmp_path, "c.py", SMALL + "auto_lr = None\nresume_from = None\n"), override)
    for part in key.split("."):
        item = getattr(item, part)
    assert item == value
    assert type(item) is type(value)


def test_a_later_override_wins_and_lists_are_indexed(tmp_path: Path) -> None:
    path = write(tmp_path, "c.py", 'data = dict(type="SAM", root="r", image_list_txt=["a.txt", "b.txt"])\n')
    config = quiet(path, "seed=1", "data.image_list_txt.1=c.txt", "seed=2")
    assert (config.seed, config.data.image_list_txt) == (2, ("a.txt", "c.txt"))
    assert "a list of 2 entries" in failure(path, "data.image_list_txt.2=c.txt")


def test_missing_file_and_missing_base(tmp_path: Path) -> None:
    child = write(tmp_path, "child.py", "_base_ = ['bsae.py']\n")
    write(tmp_path, "base.py", SMALL)
    message = failure(child)
    assert "bsae.py: no such config file (the _base_ of " in message
    assert "child.py); did you mean " in message
    assert message.endswith("base.py?")
    assert "chidl.py: no such config file; did you mean" in failure(tmp_path / "chidl.py")
    assert "nor does the folder" in failure(tmp_path / "nowhere" / "c.py")
    assert "a config is a Python file" in failure(tmp_path)


def test_circular_base(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "_base_ = ['b.py']\n")
    write(tmp_path, "b.py", "_base_ = ['./a.py']\n")
    message = failure(tmp_path / "a.py")
    assert "circular _base_" in message
    assert message.index("a.py ->") < message.index("b.py ->")
    write(tmp_path, "self.py", "_base_ = 'self.py'\n")
    assert "circular _base_" in failure(tmp_path / "self.py")


def test_one_base_reached_twice_is_not_circular_but_named(tmp_path: Path) -> None:
    write(tmp_path, "base.py", SMALL)
    write(tmp_path, "left.py", "_base_ = 'base.py'\n")
    write(tmp_path, "right.py", "_base_ = 'base.py'\n")
    message = failure(write(tmp_path, "c.py", "_base_ = ['left.py', 'right.py']\n"))
    assert "Duplicate key" in message
    assert "circular" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = 1\nmodel = (\n", "c.py line 2: syntax error"),
        ("seed = 1\n\nnum_epochs = 1 / 0\n", "c.py:3: the config raised ZeroDivisionError"),
        ("seed = sede\n", "c.py:1: the config raised NameError"),
        ("raise ValueError('two\\nlines')\n", "c.py:1: the config raised ValueError: two lines"),
        ("x = {}['key']\n", "c.py:1: the config raised KeyError: key"),
        ("_base_ = [name]\n", "c.py:1: _base_ must be a string or a list of strings"),
        ("_base_ = 3\n", "c.py:1: _base_ must be a string or a list of strings"),
        ("seed = 1\0\n", "syntax error|not Python text"),
        ("filename = 3\n", "filename is reserved"),
    ],
)
def test_config_that_cannot_run(tmp_path: Path, text: str, expected: str) -> None:
    message = failure(write(tmp_path, "c.py", text))
    assert any(part in message for part in expected.split("|"))


def test_exception_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.py", "seed = 1\nboom()\n")
    assert "base.py:2: the config raised NameError" in failure(write(tmp_path, "c.py", "_base_ = 'base.py'\n"))


def test_dict_over_a_plain_base_value_is_explained(tmp_path: Path) -> None:
    write(tmp_path, "base.py", SMALL + "auto_lr = None\n")
    message = failure(write(tmp_path, "c.py", "_base_ = 'base.py'\nauto_lr = dict(rule='sqrt')\n"))
    assert "auto_lr" in message
    assert "_delete_=True" in message


def test_notice_lists_keys_the_original_never_read() -> None:
    lines: list[str] = []
    load_config(REPOSITORY / "configs/PixArt_xl2_internal.py", ["window_size=0"], notify=lines.append)
    ignored = [line for line in lines if "ignored:" in line]
    assert len(ignored) == 1
    assert "the original never read them" in ignored[0]
    for key in ("gc_step", "eval_batch_size", "mask_type", "s3_work_dir", "window_size", "tensorboard_mox_interval"):
        assert key in ignored[0]


def test_notice_for_keys_another_data_type_reads(tmp_path: Path) -> None:
    lines: list[str] = []
    text = SMALL.replace(")", ", image_list_json=['x.json'])") + "image_list_txt = ['y.txt']\n"
    config = load_config(write(tmp_path, "c.py", text), notify=lines.append)
    assert config.data.image_list_json == ()
    assert lines[-1].endswith("ignored: data.image_list_json, image_list_txt (not read when data.type is 'Store')")


def test_a_list_bound_for_use_in_data_gets_no_notice(tmp_path: Path) -> None:
    lines: list[str] = []
    one = quiet(write(tmp_path, "one.py", 'data = dict(type="SAM", root="r", image_list_txt="a.txt")\n'))
    assert one.data.image_list_txt == ("a.txt",)  # as in the original's base file
    text = 'image_list_txt = ["a.txt"]\ndata = dict(type="SAM", root="r", image_list_txt=image_list_txt)\n'
    config = load_config(write(tmp_path, "c.py", text), notify=lines.append)
    assert config.data.image_list_txt == ("a.txt",)
    assert not any("ignored" in line for line in lines)


def test_files_and_hashes_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "c.py", SMALL)
    load_config(path)
    assert f"config {path} sha256 {hashlib.sha256(SMALL.encode()).hexdigest()}" in capsys.readouterr().err


def test_only_the_first_process_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    load_config(write(tmp_path, "c.py", SMALL))
    assert capsys.readouterr().err == ""


def test_config_from_json_is_data_and_never_runs(tmp_path: Path) -> None:
    config = quiet(write(tmp_path, "c.py", SMALL), "work_dir=__import__('os').abort()")
    assert config_from_json(config.to_json(), "config.json").work_dir == "__import__('os').abort()"
    with pytest.raises(ConfigError, match=r"config\.json: num_epochs='3' must be an integer"):
        config_from_json(config.to_json().replace('"num_epochs": 80', '"num_epochs": "3"'), "config.json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_json("{", "config.json")


def test_the_config_json_of_a_run_folder_is_a_config(tmp_path: Path) -> None:
    config = quiet(write(tmp_path, "c.py", SMALL), "optimizer.betas=[0.8,0.9]", "validation.prompts=['cat']")
    stored = write(tmp_path, "config.json", config.to_json())
    assert quiet(stored) == config
    assert quiet(stored, "seed=9").seed == 9
    assert "is not JSON" in failure(write(tmp_path, "broken.json", config.to_json()[:-5]))
    assert "must hold one object" in failure(write(tmp_path, "list.json", "[]"))
    assert "no such config file; did you mean" in failure(tmp_path / "confg.json")
    assert "config.json: num_epochs=0 must be" in failure(write(tmp_path, "config.json", '{"num_epochs": 0}'))


def test_loading_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    quiet(write(tmp_path, "c.py", SMALL))
    failure(write(tmp_path, "bad.py", "boom()\n"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.py", "c.py", "scratch"]
