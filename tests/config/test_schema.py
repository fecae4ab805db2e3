"""Validation: unknown keys, types, ranges, choices, and what a config offers once it is built."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from diffusion.config import ConfigError, TrainConfig, check_choice, describe_keys, load_config
from diffusion.config.legacy import NEVER_READ
from diffusion.config.problems import all_keys

BASE = """data = dict(
    type="Store",
    root="features",
)
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(BASE)
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, notify=lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("modle", "model"),
        ("modle.depth", "model"),
        ("trian_batch_size", "train_batch_size"),
        ("gradient_clipping", "gradient_clip"),
        ("Num_Epochs", "num_epochs"),
        ("mixed_presicion", "mixed_precision"),
        ("ema_rat", "ema_rate"),
        ("lewi_scale", "lewei_scale"),
        ("optimizer.weigth_decay", "optimizer.weight_decay"),
        ("optimiser", "optimizer"),
        ("lr", "optimizer.lr"),
        ("weight_decay", "optimizer.weight_decay"),
        ("lr_warmup_steps", "lr_schedule_args.num_warmup_steps"),
        ("lr_schedule_args.num_warmup_step", "lr_schedule_args.num_warmup_steps"),
        ("data.rot", "data.root"),
        ("data.balance", "data.balance_by"),
        ("validation.every_step", "validation.every_steps"),
        ("validation.prompt", "validation.prompts"),
        ("process.min_snr_gama", "process.min_snr_gamma"),
        ("process.timestep_samplng", "process.timestep_sampling"),
        ("resume_from.checkpoints", "resume_from.checkpoint"),
        ("save_model_step", "save_model_steps"),
    ],
)
def test_unknown_key_names_the_nearest(config_file: Path, typo: str, meant: str) -> None:
    message = failure(config_file, f"{typo}=1")
    assert message.startswith("--cfg-options: unknown key ")
    assert "(value " in message
    section = f"{typo.rpartition('.')[0]}."
    assert message.endswith(f"did you mean '{meant.removeprefix(section)}'?")


def test_every_dropped_letter_is_noticed_and_named(config_file: Path) -> None:
    for path in all_keys(TrainConfig):
        name = path[-1]
        if len(name) < 7:
            continue
        typo = ".".join((*path[:-1], name[:3] + name[4:]))
        message = failure(config_file, f"{typo}=1")
        assert f"unknown key '{typo}'" in message
        assert "did you mean" in message


def test_place_is_the_file_and_line_that_set_the_key(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        BASE.replace('root="features",', 'root="features",\n    splitt="train",') + "seed = 1\n"
    )
    child = tmp_path / "child.py"
    child.write_text("_base_ = ['base.py']\ntrain_batch_size = 4\n")
    assert "base.py:4: unknown key 'data.splitt' (value 'train'); did you mean 'split'?" in failure(child)
    child.write_text("_base_ = ['base.py']\ndata = {'_delete_': True, 'type': 'Store',\n 'root': 3}\n")
    assert "child.py:3: data.root=3 must be a string" in failure(child)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train_batch_size='32'", "train_batch_size='32' must be an integer, not a string"),
        ("train_batch_size=1.5", "train_batch_size=1.5 must be an integer"),
        ("train_batch_size=True", "train_batch_size=True must be an integer"),
        ("train_batch_size=0", "train_batch_size=0 must be greater than 0"),
        ("gradient_clip='1'", "gradient_clip='1' must be a number, not a string"),
        ("gradient_clip=True", "gradient_clip=True must be a number"),
        ("gradient_clip=1e999", "gradient_clip=inf must be a finite number"),
        ("use_fsdp='False'", "use_fsdp='False' must be True or False, not a string"),
        ("use_fsdp=0", "use_fsdp=0 must be True or False"),
        ("model=3", "model=3 must be a string"),
        ("work_dir=''", "work_dir='' must not be empty"),
        ("ema_rate=1.0", "ema_rate=1.0 must be less than 1"),
        ("class_dropout_prob=1.1", "class_dropout_prob=1.1 must be less than or equal to 1"),
        ("checkpoints_total_limit=1", "checkpoints_total_limit=1 must be greater than or equal to 2"),
        ("image_size=100", "image_size=100 must be a multiple of 16"),
        ("mixed_precision=bf61", "must be one of 'no', 'fp16', 'bf16'; did you mean 'bf16'?"),
        ("aspect_ratio_type=ASPECT_RATIO_1023", "did you mean 'ASPECT_RATIO_1024'?"),
        ("lr_schedule=cosin", "did you mean 'cosine'?"),
        ("data.type=InternalDatMS", "did you mean 'InternalDataMS'?"),
        (
            "optimizer.type=Lamb",
            "must be one of 'AdamW', 'Adam', 'SGD', 'Muon', 'Lion', 'CAME', 'Prodigy', 'AdamW8bit'; replace the",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be 2 numbers in [0, 1) for AdamW"),
        ("optimizer.betas=[0.9,0.99,0.999]", "must be 2 numbers in [0, 1) for AdamW; usual values are (0.9, 0.999)"),
        ("optimizer.eps=[1e-8,1e-8]", "must be one number above 0 for AdamW"),
        ("optimizer.eps=0", "must be one number above 0 for AdamW"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9 is not read by AdamW; leave it out (in an inherited"),
        ("lr_schedule_args.x=1", "unknown key 'lr_schedule_args.x' (value 1); valid keys: num_warmup_steps"),
        ("zzzqq=1", "unknown key 'zzzqq' (value 1); `python -m diffusion.config` lists all keys"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0] must be 2 numbers in [0, 1)"),
        ("optimizer=AdamW", "optimizer='AdamW' must be a dict(...) with the keys type, lr,"),
        ("validation.prompts=cat", "validation.prompts='cat' must be a list"),
        ("validation.prompts=[1]", "validation.prompts.0=1 must be a string"),
        ("multi_scale=True", "aspect_ratio_type must name a table when multi_scale is True"),
        ("kv_compress=True", "kv_compress_config must set sampling and kv_compress_layer"),
        ("w_min=16", "w_min=16 must not exceed w_max=15.0"),
        ("process.timestep_sampling=logitnormal", "did you mean 'logit_normal'?"),
        ("process.logit_mean=0.5", "process.logit_mean=0.5 has no effect here; set process.timestep_sampling="),
        ("process.logit_std=0", "process.logit_std=0 must be greater than 0"),
        ("posthoc_ema={}", "posthoc_ema.snapshot_every_steps is required"),
        (
            "posthoc_ema={'snapshot_every_steps':5,'sigma_rels':[0.05,0.3]}",
            "posthoc_ema.sigma_rels=[0.05, 0.3] must be",
        ),
        ("posthoc_ema={'snapshot_every_steps':5,'sigma_rels':[0.1,0.1]}", "must be different numbers between 0 and"),
        ("posthoc_ema={'snapshot_every_steps':5,'sigma_rels':[]}", "must be different numbers between 0 and"),
        ("posthoc_ema={'snapshot_every_steps':5,'dtype':'bf16'}", "must be one of 'fp16', 'fp32'"),
        ("model.depth=3", "cannot set 'model.depth=3': model is"),
        ("seed", "'seed' must have the form key=value"),
        ("=3", "'=3' must have the form key=value"),
        ("data.type=SAM", "data.image_list_txt must not be empty when data.type is 'SAM'"),
    ],
)
def test_wrong_value(config_file: Path, override: str, expected: str) -> None:
    if "model is" in expected:
        config_file.write_text(BASE + "model = 'PixArt_XL_2'\n")
        expected = expected.replace("model is", "model='PixArt_XL_2' is")
    assert expected in failure(config_file, override)


def test_two_names_of_the_position_scale_must_agree(config_file: Path) -> None:
    message = failure(config_file, "lewei_scale=1.0", "pe_interpolation=2.0")
    assert "pe_interpolation=2.0 contradicts lewei_scale=1.0" in message
    assert load_config(config_file, ["lewei_scale=2"], notify=print).pe_interpolation == 2.0


def test_prompts_come_from_one_place(config_file: Path) -> None:
    message = failure(config_file, "validation.prompts=['cat']", "validation.prompt_file=asset/samples.txt")
    assert "validation.prompt_file='asset/samples.txt' cannot be combined with validation.prompts" in message


def test_missing_data_is_required(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("seed = 1\n")
    assert failure(path).endswith("c.py: data is required but not set")
    path.write_text("data = dict(type='Store')\n")
    assert failure(path).endswith("c.py:1: data.root is required but not set")


def test_other_problems_are_named_too(config_file: Path) -> None:
    assert failure(config_file, "seed=-1", "num_epochs=0").endswith("(also wrong: seed)")


def test_long_values_are_shortened(config_file: Path) -> None:
    assert len(failure(config_file, f"seed={'x' * 5000}")) < 200


def test_choices_known_to_the_caller(config_file: Path) -> None:
    names = ["PixArt_XL_2", "PixArtMS_XL_2"]
    assert load_config(config_file, choices={"model": lambda: names}, notify=print).model == "PixArt_XL_2"
    config_file.write_text(BASE + "model = 'PixArt_XL2'\n")
    with pytest.raises(ConfigError, match=r"config\.py:5: model='PixArt_XL2' .*did you mean 'PixArt_XL_2'\?"):
        load_config(config_file, choices={"model": lambda: names}, notify=print)
    assert check_choice("model", "PixArt_XL_2", names, "x") == "PixArt_XL_2"
    with pytest.raises(ConfigError, match=r"^somewhere: model='cat' must be one of 'PixArt_XL_2', 'PixArtMS_XL_2'$"):
        check_choice("model", "cat", names, "somewhere")


def test_defaults_are_the_originals(config_file: Path) -> None:
    config = load_config(config_file, notify=print)
    expected = {
        "image_size": 256, "train_batch_size": 32, "model": "PixArt_XL_2", "lewei_scale": 1.0, "num_workers": 4,
        "train_sampling_steps": 1000, "eval_sampling_steps": 250, "model_max_length": 120, "lora_rank": 4,
        "num_epochs": 80, "gradient_accumulation_steps": 1, "gradient_clip": 1.0, "lr_schedule": "constant",
        "save_model_epochs": 1, "save_model_steps": 1_000_000, "sample_posterior": True, "scale_factor": 0.18215,
        "ema_rate": 0.9999, "log_interval": 50, "snr_loss": False, "seed": 43, "valid_num": 0, "cfg_scale": 4.0,
        "mixed_precision": "bf16", "null_caption": "stored", "class_dropout_prob": 0.1, "load_from": None,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.optimizer.type, config.optimizer.lr, config.lr_schedule_args.num_warmup_steps) == (
        "AdamW",
        1e-4,
        500,
    )
    assert not set(NEVER_READ) & set(TrainConfig.model_fields)


def test_validation_interval(config_file: Path) -> None:
    def interval(*overrides: str) -> int | None:
        return load_config(config_file, overrides, notify=print).validation_every_steps

    assert interval() is None
    assert interval("pipeline_load_from=folder") == 250
    assert interval("pipeline_load_from=folder", "eval_sampling_steps=7") == 7
    assert interval("pipeline_load_from=folder", "validation.every_steps=9") == 9
    assert interval("validation.every_steps=9") == 9


def test_a_config_cannot_be_changed(config_file: Path) -> None:
    config = load_config(config_file, notify=print)
    with pytest.raises(pydantic.ValidationError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        config.optimizer.lr = 3.0  # type: ignore[misc]


def test_every_key_is_described() -> None:
    lines = describe_keys().split("\n")
    keys = [".".join(path) for path in all_keys(TrainConfig)]
    assert [line.split(" ")[0] for line in lines] == keys
    assert all(len(line.split("): ", 1)[1]) > 12 for line in lines)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            "type='CAME', betas=(0.9, 0.9)",
            "must be 3 numbers in [0, 1) for CAME; usual values are (0.9, 0.999, 0.9999)",
        ),
        ("type='CAME', eps=1e-8", "must be two numbers above 0 for CAME"),
        ("type='Lion', eps=1e-8", "eps=1e-08 is not read by Lion"),
        ("type='SGD', betas=(0.9, 0.9)", "is not read by SGD"),
    ],
)
def test_numbers_of_an_optimiser_fit_its_type(section: str, expected: str, config_file: Path) -> None:
    config_file.write_text(BASE + f"optimizer = dict({section})\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config_file)
    assert expected in str(caught.value)


def test_sigmas_name_of_came_is_known(config_file: Path) -> None:
    config_file.write_text(
        BASE + "optimizer = dict(type='CAMEWrapper', betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16))\n"
    )
    assert load_config(config_file).optimizer.type == "CAME"
