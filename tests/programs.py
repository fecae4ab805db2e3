"""Programs as a shell would start them, without what a shell waits for: each runs in a process of its own that is
forked from one which has already imported the large libraries. The imports take ten seconds, many a program one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["diffusion.inference", "diffusion.training", "diffusion.features", "diffusers", "peft"])


def run_program(
    arguments: Sequence[object], folder: Path = ROOT, timeout: float = 500, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in `folder`: a script with its options, or -c and code; -m starts a Python anew.

    Args:
        variables: of the environment, beside those of this process.
    Raises:
        subprocess.TimeoutExpired: it was ended after `timeout` seconds.
    """
    command = [str(argument) for argument in arguments]
    environment = {**_environment(), **variables}
    if command[0] == "-m":
        return _run_afresh([sys.executable, *command], folder, environment, timeout)
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place) / name for name in ("stdout", "stderr")]
        child = _FORKS.Process(target=_run, args=(command, str(folder), environment, *map(str, outputs)))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in outputs]
    return subprocess.CompletedProcess(["python", *command], child.exitcode, *texts)


def run_line(line: str, folder: Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """A line of bash. A call of Python in which bash would expand or redirect nothing is a `run_program`."""
    if line.startswith("python ") and not set("$`*?~{}|&;<>()") & set(line):
        return run_program(shlex.split(line)[1:], folder, timeout)
    return _run_afresh(["bash", "-c", line], folder, _environment(), timeout)


def below_file_size(size: int, command: Sequence[object]) -> list[str]:
    """Arguments of python for a script whose files may not grow beyond `size` bytes, as on a full disk."""
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return ["-c", code, *map(str, command)]


def _environment() -> dict[str, str]:
    """`python` is this one, and finds this repository."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run_afresh(
    command: list[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def _run(command: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: become the program."""
    for number, path in ((1, stdout), (2, stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if command[0] == "-c":
        sys.argv = command[:1] + command[2:]
        sys.path.insert(0, "")
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")
