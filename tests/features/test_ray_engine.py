"""Extraction on a real Ray cluster of two nodes on this machine, against the local engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffusion.errors import ConfigError
from diffusion.features import ExtractionSettings, FeatureStore, extract_folder
from diffusion.features import ray_engine as module
from diffusion.features.extract import Encoders
from tests.features.test_extract import contents, make_source
from tests.tiny import write_tiny_pipeline_parts
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_NODES = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
second = cluster.add_node(**options)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("lost", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline_parts(tmp_path_factory.mktemp("pipeline"))


@contextlib.contextmanager
def cluster_of_two() -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a cluster of two nodes of two CPUs each, and a function that pulls the plug of the second."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NODES], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, lines = process.stdin, iter(process.stdout.readline, "")

    def lose() -> None:
        print("lose", file=stdin, flush=True)
        assert next(line for line in lines if line == "lost\n")

    try:
        yield next(line.strip() for line in lines if line[:1].isdigit()), lose
    finally:
        stdin.close()
        process.wait(60)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads; Ray gives its tasks one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that lives as long as this module."""
    pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")
    with cluster_of_two() as (address, _):
        yield address


def start(address: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools/extract_features.py"), *map(str, arguments), "--engine", "ray"]
    environment = {**ENVIRONMENT, "RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_the_cluster(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(address, *arguments)
    out, errors = process.communicate(timeout=500)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


@pytest.mark.slow
def test_two_nodes_make_what_the_local_engine_makes(tmp_path: Path, pipeline: Path, address: str) -> None:
    # 80 captions a picture: a shard then holds 51 pictures, so 170 pictures are four blocks.
    source = make_source(tmp_path / "src", 170)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["captions"] = [f"a cat and {number} dogs" for number in range(79)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "images/007.png").write_bytes(b"not a picture")
    settings = ExtractionSettings(image_size=32, batch_size=3)
    extract_folder(source, tmp_path / "one", pipeline, settings, device="cpu")
    given = [source, "--pretrained", pipeline, "--image-size", 32, "--batch-size", 3, "--out", tmp_path / "ray"]
    done = on_the_cluster(address, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "169 pictures (169 new); 1 rejected" in done.stdout
    assert "by 2 nodes" in done.stdout
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    # As if the driver had been killed: two blocks are there, two are not.
    whole = contents(tmp_path / "ray")
    manifest = json.loads(whole["manifest.json"])
    blocks = {number: shard for number, shard in enumerate(manifest["shards"]) if number in (1, 3)}
    for number, shard in blocks.items():
        entry = {"shard": shard, "rejected": [], "counts": {}}
        (tmp_path / "ray/.blocks" / f"{number:05d}.json").write_text(json.dumps(entry))
    interrupted = {name: value for name, value in manifest.items() if name != "index"}
    (tmp_path / "ray/manifest.json").write_text(json.dumps({**interrupted, "complete": False, "shards": []}))
    for name in whole.keys() - {shard["name"] for shard in blocks.values()}:
        if name.endswith(".arrow") or name == "rejected.jsonl":
            (tmp_path / "ray" / name).unlink()
    kept = {shard["name"]: (tmp_path / "ray" / shard["name"]).stat().st_mtime_ns for shard in blocks.values()}
    done = on_the_cluster(address, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / "ray" / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert contents(tmp_path / "ray") == whole
    assert len(FeatureStore(tmp_path / "ray", verify=True)) == 169


@pytest.mark.slow
def test_a_lost_node_leaves_no_trace(tmp_path: Path, pipeline: Path) -> None:
    pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")
    source = make_source(tmp_path / "src", 200)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["captions"] = [f"a cat and {number} dogs" for number in range(79)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_folder(source, tmp_path / "one", pipeline, ExtractionSettings(image_size=32), device="cpu")
    with cluster_of_two() as (address, lose):
        given = [source, "--pretrained", pipeline, "--image-size", 32, "--out", tmp_path / "ray"]
        process = start(address, *given)
        wait_until(lambda: list((tmp_path / "ray").glob(".blocks/*.json")), process)
        lose()
        out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    assert "200 pictures (200 new); 0 rejected" in out
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.slow
def test_errors_of_the_cluster_are_one_line(tmp_path: Path, pipeline: Path, address: str) -> None:
    source = make_source(tmp_path / "src", 4)
    given = [source, "--image-size", 32, "--out", tmp_path / "out"]
    weights = pipeline / "text_encoder/model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:1000])
        broken = on_the_cluster(address, *given, "--pretrained", pipeline)
    finally:
        weights.write_bytes(kept)
    no_gpu = on_the_cluster(address, *given, "--pretrained", pipeline, "--device", "cuda")
    nobody = on_the_cluster("nonsense", *given, "--pretrained", pipeline)
    expected = ("text encoder cannot be loaded", "the Ray cluster has no GPU", "no cluster (")
    for done, message in zip((broken, no_gpu, nobody), expected):
        assert done.returncode == 2, done.stderr[-3000:]
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last, done.stderr[-3000:]
        assert "Traceback" not in done.stderr


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as on a machine where it is not installed
    with pytest.raises(ConfigError, match=r"run `pip install 'pixart\[ray\]'`"):
        module.RayEngine(Encoders(tmp_path, tmp_path), ExtractionSettings(), "auto")
