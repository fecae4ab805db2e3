"""Downloads over real HTTP from a hub on this machine: layout, licence, resume, checksums, and no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from diffusion.checkpoints import open_checkpoint
from diffusion.checkpoints.download import download, list_published
from diffusion.checkpoints.published import PUBLISHED, RECORDED, find_published
from diffusion.errors import CheckpointError, StorageError
from tests.checkpoints.hub_server import Hub, running_hub
from tests.checkpoints.tiny_files import small_model, write_old_diffusers
from tests.doors import Door

MODEL = "PixArt-XL-2-512x512.pth"
BIG = bytes(range(256)) * 40_000  # 10 MB: more than one chunk of the client
FILES = {
    MODEL: BIG,
    "PixArt-XL-2-1024-MS.pth": b"another",
    "t5-v1_1-xxl/config.json": b"{}",
    "t5-v1_1-xxl/spiece.model": b"pieces",
    "sd-vae-ft-ema/config.json": b"{}",
    "sd-vae-ft-ema/diffusion_pytorch_model.bin": b"vae",
    "README.md": b"card",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub({"PixArt-alpha/PixArt-alpha": FILES}) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def test_the_tool_fetches_the_layout_of_the_original(hub: Hub, tmp_path: Path, run: Door) -> None:
    done = run("tools/download.py", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    places = {"t5-v1_1-xxl/": "t5_ckpts/t5-v1_1-xxl/"}
    expected = {next((v + n.removeprefix(k) for k, v in places.items() if n.startswith(k)), n) for n in FILES} - {
        "README.md"
    }
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == expected
    assert (tmp_path / MODEL).read_bytes() == BIG
    assert "PixArt-α-512, licence openrail++, from PixArt-alpha/PixArt-alpha" in done.stdout
    assert "licence apache-2.0 (the repository's card says openrail++)" in done.stdout
    assert f"6 files are complete in {tmp_path}" in done.stdout
    hub.ranges.clear()
    said: list[str] = []
    download([find_published(MODEL)], tmp_path, say=said.append)
    assert said[-1] == f"  {tmp_path / MODEL}: here, checksum right"
    assert hub.ranges == []  # nothing was fetched again


def test_a_download_goes_on_where_a_killed_one_stopped(hub: Hub, tmp_path: Path) -> None:
    row = find_published(MODEL)
    download([row], tmp_path, say=lambda line: None)
    (tmp_path / MODEL).unlink()
    from diffusion.checkpoints.download import _remote_files

    (file,) = _remote_files(row, "main", tmp_path)[1]
    part = tmp_path / f".{MODEL}.{file.sha256[:16]}.part"
    part.write_bytes(BIG[:3_000_000])
    hub.ranges.clear()
    assert download([row], tmp_path, say=lambda line: None) == [tmp_path / MODEL]
    assert hub.ranges == ["bytes=3000000-"]
    assert (tmp_path / MODEL).read_bytes() == BIG
    assert not part.exists()


def test_a_broken_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = 1_234_567
    download([find_published(MODEL)], tmp_path, say=lambda line: None)
    assert (tmp_path / MODEL).read_bytes() == BIG
    assert len(hub.ranges) == 2


def test_damage_is_found_and_mended(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    row = find_published(MODEL)
    (tmp_path / MODEL).write_bytes(b"\1" + BIG[1:])  # right size, one wrong byte
    download([row], tmp_path, say=said.append)
    assert (tmp_path / MODEL).read_bytes() == BIG
    assert said[-1].endswith("MB, checksum right")
    (tmp_path / MODEL).unlink()
    hub.statements[MODEL] = "0" * 64
    with pytest.raises(CheckpointError, match="arrived damaged .*was removed; run the same command again"):
        download([row], tmp_path, say=said.append)
    assert list(tmp_path.glob("*.pth")) == list(tmp_path.glob("*.part")) == []
    config = find_published("T5")
    download([config], tmp_path, say=said.append)
    small = tmp_path / "t5_ckpts/t5-v1_1-xxl/config.json"  # has a git hash alone
    small.write_bytes(b"{]")
    download([config], tmp_path, say=said.append)
    assert small.read_bytes() == b"{}"


def test_without_a_network_the_message_says_what_to_put_where(
    hub: Hub, tmp_path: Path, run: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tools/download.py", "--model_names", MODEL, "--only_models", "--output_dir", tmp_path]
    by_hand = f"fetch {MODEL} from {hub.address}/PixArt-alpha/PixArt-alpha elsewhere and put it at {tmp_path / MODEL}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = run(*command)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    for done in (offline, run(*command)):
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert by_hand in done.stderr
    assert MODEL in run("tools/download.py", "--list", "--output_dir", tmp_path).stdout


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no ControlNetHED.pth any more"):
        download([find_published("ControlNetHED.pth")], tmp_path)
    with pytest.raises(CheckpointError, match="neither a local path nor a repository on"):
        download([find_published("PixArt-Sigma-XL-2-512-MS.pth")], tmp_path)
    with pytest.raises(CheckpointError, match="did you mean 'PixArt-XL-2-512x512.pth'"):
        find_published("PixArt-XL-2-512x512.pt")


def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path: Path, run: Door) -> None:
    for given, nearest in (("PixArt-XL-2-512x512.pt", MODEL), ("pixart-sigma-xl-2-512-ms", "PixArt-Sigma-XL-2-512-MS")):
        done = run("tools/download.py", "--model_names", given, "--output_dir", tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{given!r} is no published PixArt file; did you mean {nearest!r}?" in done.stderr
    done = run("tools/download.py", "--model_names", "stable-diffusion", "--output_dir", tmp_path)
    assert "choose one of T5, VAE, " in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("diffusion.checkpoints.download.shutil.disk_usage", lambda place: usage)
    with pytest.raises(StorageError, match=r"0\.0 GB are missing .* make room"):
        download([find_published(MODEL)], tmp_path, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_hub_ids_open_like_local_paths(hub: Hub, tmp_path: Path) -> None:
    model = small_model(input_size=128, micro_condition=True, pe_interpolation=2.0)
    folder = write_old_diffusers(model, tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    transformer = {f"transformer/{path.name}": path.read_bytes() for path in folder.iterdir()}
    index = {"model_index.json": b'{"_class_name": "PixArtAlphaPipeline"}', "text_encoder/big.bin": b"never fetched"}
    hub.files["someone/whole"] = {**transformer, **index}
    hub.files["someone/native"] = {"weights/model.pth": (tmp_path / "model.pth").read_bytes()}
    opened = open_checkpoint("someone/whole")
    assert opened.found.config == model.config
    assert torch.equal(opened.state_dict["t_block.1.weight"], model.t_block[1].weight)
    assert not list((tmp_path / "cache").rglob("big.bin"))
    assert open_checkpoint("someone/native/weights/model.pth", num_heads=2).found.config == model.config
    with pytest.raises(CheckpointError, match="someone/absent is neither a local path nor a repository"):
        open_checkpoint("someone/absent")
    with pytest.raises(CheckpointError, match="someone/native has no no.pth"):
        open_checkpoint("someone/native/no.pth")


def test_the_list_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(b"x")
    lines = list_published(tmp_path)
    assert len(lines) == len(PUBLISHED) == len({row.name for row in PUBLISHED})
    assert [line for line in lines if "[here]" in line] == [line for line in lines if line.startswith(f"{MODEL} ")]


def test_recorded_counts_are_those_of_the_networks() -> None:
    from diffusion.checkpoints import native_to_diffusers
    from diffusion.checkpoints.keys import NATIVE_ONLY
    from tests.checkpoints.tiny_files import control_state

    names = {row.name.removesuffix(".pth") for row in PUBLISHED if row.kind in ("transformer", "controlnet")}
    assert names == set(RECORDED)
    for recorded in {id(value): value for value in RECORDED.values()}.values():
        with torch.device("meta"):
            model = recorded.network(**{"hidden_size": 1152, "depth": 28, "num_heads": 16, **recorded.options})
        state = model.state_dict()
        assert len(native_to_diffusers(state)) == recorded.num_diffusers_keys
        if recorded.control_blocks:
            state = control_state(model, recorded.control_blocks)
        assert len(state) == recorded.num_keys
        counted = [tensor for key, tensor in state.items() if key.removeprefix("base_model.") not in NATIVE_ONLY]
        assert sum(tensor.numel() for tensor in counted) == recorded.num_parameters
