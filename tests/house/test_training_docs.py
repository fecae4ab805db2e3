"""docs/training.md and training-parallel.md stay true: recipes parse; tests, flags and files that they name exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from diffusion import errors
from diffusion.config import train_parser
from diffusion.config.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", blocks("bash"))
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inner = re.findall(r"bash -c '(.*?)'", script, flags=re.DOTALL)
    assert all(subprocess.run(["bash", "-n", "-c", text]).returncode == 0 for text in inner)


def test_commands_have_flags_of_the_program() -> None:
    words = [
        line.split("train.py ", 1)[1].split() for line in TEXT.splitlines() if "train_scripts/train.py CONFIG" in line
    ]
    assert len(words) == 6
    for command in words:
        arguments = train_parser(None).parse_args([word.rstrip("'") for word in command])
        assert arguments.config == "CONFIG"


def test_the_job_agrees_with_itself_and_the_exit_codes() -> None:
    service, job = yaml.safe_load_all(blocks("yaml")[0])
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"WORLD_SIZE={spec['completions']} " in container["args"][0]
    assert f"MASTER_ADDR={job['metadata']['name']}-0.{pod['subdomain']} " in container["args"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    actions = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"]}
    assert {rule["containerName"] for rule in actions.values()} == {container["name"]}
    assert actions["Ignore"]["values"] == [errors.EXIT_PREEMPTED]
    fatal = [errors.EXIT_USER_ERROR, errors.EXIT_WORK_DIR_LOCKED, errors.EXIT_NUMERICAL]
    assert actions["FailJob"]["values"] == fatal


def test_named_tests_and_keys_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests/training" / file).read_text(encoding="utf-8"), (file, test)
    for key in ("save_async", "checkpoints_total_limit", "checkpoints_keep_every", "max_failed_saves", "max_steps"):
        assert key in TrainConfig.model_fields
        assert f"`{key}" in TEXT
    for path in re.findall(r"\]\(\.\./([^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_the_second_fault_table_names_tests_that_exist() -> None:
    text = (ROOT / "docs/training-parallel.md").read_text(encoding="utf-8")
    table = text[text.index("| fault | what happens |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    of_training = [*(ROOT / "tests/training").glob("test_*.py")]
    for row in table:
        for name in re.findall(r"`([^`]+)`", row.rstrip("|").rsplit("|", 1)[1]):
            if name.startswith("["):  # a parameter of the test in the row above
                continue
            file = re.search(r"test_\w+\.py", name)
            sources = [*(ROOT / "tests").rglob(file[0])] if file else of_training
            assert sources, row
            if test := re.search(r"(?:^|::)(test_\w+)(?:\[|$)", name):
                assert any(f"def {test[1]}(" in path.read_text(encoding="utf-8") for path in sources), name
