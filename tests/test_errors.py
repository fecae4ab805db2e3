"""Entry scripts end in one line and an exit code, or in a traceback when the fault is ours."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from diffusion.errors import ConfigError, NumericalError, StorageError, WorkDirLockedError, did_you_mean, run_cli


def fail(error: BaseException) -> None:
    def main() -> None:
        raise error

    run_cli(main)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a=1 is wrong;\nuse 2"), 2),
        (StorageError("full"), 74),
        (WorkDirLockedError("held"), 76),
        (NumericalError("nan"), 77),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (KeyboardInterrupt(), 130),
    ],
)
def test_one_line_and_a_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIXART_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught:
        fail(error)
    assert caught.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_unusable_paths_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIXART_DEBUG", raising=False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        run_cli((tmp_path / "file" / "run").mkdir)
    assert caught.value.code == 2
    assert f"{tmp_path / 'file' / 'run'} cannot be used (Not a directory)" in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXART_DEBUG", raising=False)
    for error in (ValueError("x"), OSError("no errno"), ConnectionResetError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)):
            fail(error)
    monkeypatch.setenv("PIXART_DEBUG", "1")
    with pytest.raises(ConfigError):
        fail(ConfigError("x"))


def test_the_nearest_name_is_found_in_any_case() -> None:
    choices = ["PixArt_XL_2", "PixArtMS_XL_2", "Cinematic"]
    assert did_you_mean("PIXART-XL-2", choices) == "did you mean 'PixArt_XL_2'?"
    assert did_you_mean("CINEMATIC", choices) == "did you mean 'Cinematic'?"
    assert did_you_mean("q", choices) == "choose one of PixArt_XL_2, PixArtMS_XL_2, Cinematic"
