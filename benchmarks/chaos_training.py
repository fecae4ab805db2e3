"""Kill a training run again and again; it must end with the weights of a run that nobody disturbed, bit for bit.

A run of two processes (gloo, CPU) on the bundled pictures is ended by `kill -9` of one or all processes at random
moments, in the middle of a save, and by SIGTERM, and is resumed each time with `latest`. When it is done, everything
that it left is compared with an undisturbed run: weights, averages, optimiser, post-hoc snapshots, metrics.jsonl. Then
it begins anew, until all faults are spent. Processes are forked from one that has imported everything.

    python benchmarks/chaos_training.py            # 100 kills, 20 of them in a save, and 20 SIGTERM
    python benchmarks/chaos_training.py --kills 4 --kills-in-save 2 --terminations 2 --out /tmp/chaos.json
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from report import write_report
from safetensors.torch import load_file

from diffusion.checkpoints.training_state import list_checkpoints, verify
from diffusion.config import TrainConfig, load_config
from diffusion.errors import EXIT_DONE, EXIT_PREEMPTED, run_cli
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.files import hash_file
from diffusion.training import Reporting, Trainer, denoising_objective

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "output/pretrained_models/emoji-256"
RANKS = 2
CONFIG = """
data_root = '/'
data = dict(type='Store', root={store!r})
image_size = 64
model = 'PixArt_Ti_2'
hidden_size, depth, num_heads = 64, 2, 2
caption_channels = {channels}
null_caption = 't5_empty'
train_batch_size = 2
num_workers = 0
max_steps = {steps}
log_interval = 3
save_model_steps = 4
save_model_epochs = None
checkpoints_total_limit = 2
mixed_precision = 'no'
ema_rate = 0.9
posthoc_ema = dict(snapshot_every_steps=10)
optimizer = dict(lr=1e-3)
lr_schedule_args = dict(num_warmup_steps=5)
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=80, help="kill -9 at random moments")
    parser.add_argument("--kills-in-save", type=int, default=20, help="kill -9 while a checkpoint is being written")
    parser.add_argument("--terminations", type=int, default=20, help="SIGTERM to one process or to all")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a run; saves every 4")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' moments")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/chaos_training.json")
    return parser.parse_args()


class Processes:
    """The processes of one start of the run, forked from this one; output goes to LOG."""

    def __init__(self, config: TrainConfig, work_dir: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.codes: dict[int, int] = {}
        self.pids = []
        for rank in range(RANKS):
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**address, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
            self.pids.append(_fork(functools.partial(_train, config, work_dir, log, environment)))

    def are_over(self) -> bool:
        """Whether all have ended; takes their exit codes."""
        for pid in self.pids:
            if pid not in self.codes and (done := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                self.codes[pid] = os.waitstatus_to_exitcode(done[1])
        return len(self.codes) == len(self.pids)

    def send(self, number: signal.Signals, chosen: list[int]) -> None:
        for pid in chosen:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes by rank; what does not end in time is killed."""
        limit = time.monotonic() + seconds
        while not self.are_over():
            if time.monotonic() > limit:
                self.send(signal.SIGKILL, self.pids)
                limit = float("inf")
            time.sleep(0.002)
        return [self.codes[pid] for pid in self.pids]


def _train(config: TrainConfig, work_dir: Path, log: Path, environment: dict[str, str]) -> None:
    """What a forked process of a run does."""
    os.environ |= environment
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_cli(lambda: Trainer(config, denoising_objective, work_dir, resume_from="latest",
                            reporting=Reporting(tensorboard=False)).fit())  # fmt: skip


def _fork(work: Callable[[], object]) -> int:
    """The number of a process that does `work` and ends like a program: with its code, or with a traceback and 1."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)  # makes torch's pool anew: threads that need it first race for it ("Invalid thread pool!")
    code = 1
    try:
        work()
        code = EXIT_DONE
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


class Chaos:
    """Runs, faults and what came of them."""

    def __init__(self, config: TrainConfig, folder: Path, seed: int) -> None:
        self.config, self.folder, self.rng = config, folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.log = folder / "log.txt"
        begin = time.monotonic()
        assert Processes(config, folder / "undisturbed", self.log).wait(600) == [0] * RANKS, self.log.read_text()
        self.whole_s = time.monotonic() - begin
        self.expected = contents(folder / "undisturbed")

    def run(self, faults: list[str]) -> None:
        """Run after run, one fault a start, until all faults are spent; every run is then compared."""
        while faults:
            work_dir = self.folder / "disturbed"
            shutil.rmtree(work_dir, ignore_errors=True)
            while True:
                processes = Processes(self.config, work_dir, self.log)
                self.counts["starts"] += 1
                if faults and getattr(self, f"_{faults[-1]}")(processes, work_dir):
                    self.counts[faults.pop()] += 1
                if processes.wait() == [0] * RANKS:
                    break
                self._take_stock(work_dir)
            self.counts["runs"] += 1
            different = differences(self.expected, contents(work_dir))
            assert not different, f"run {self.counts['runs']} differs in {', '.join(different)}"
            print(f"run {self.counts['runs']}: equal; {dict(self.counts)}", flush=True)

    def _take_stock(self, work_dir: Path) -> None:
        """After a fault every visible checkpoint is whole."""
        for _, folder in list_checkpoints(work_dir / "checkpoints"):
            problem = verify(folder)
            self.counts["corrupt"] += problem is not None
            self.counts["verified"] += 1
        self.counts["corrupt"] += len([*(work_dir / "checkpoints").glob("*.corrupt*")])

    # ---- faults: each says whether it happened, or came too late ----

    def _kill(self, processes: Processes, work_dir: Path) -> bool:
        moment = time.monotonic() + self.rng.uniform(0, self.whole_s)
        if not _until(lambda: time.monotonic() > moment, processes):
            return False
        chosen = self.rng.choice([processes.pids, processes.pids[:1], processes.pids[1:]])
        processes.send(signal.SIGKILL, chosen)
        codes = processes.wait(30)
        return all(codes[processes.pids.index(pid)] == -9 for pid in chosen)

    def _kill_in_save(self, processes: Processes, work_dir: Path) -> bool:
        checkpoints = work_dir / "checkpoints"
        for _ in range(self.rng.randrange(3)):  # not always the first save of a start
            if not _until(lambda: _is_saving(checkpoints), processes):
                return False
            _until(lambda: not _is_saving(checkpoints), processes)
        if not _until(lambda: _is_saving(checkpoints), processes):
            return False
        time.sleep(self.rng.uniform(0, 0.05))
        processes.send(signal.SIGKILL, processes.pids)
        processes.wait(30)
        return _is_saving(checkpoints)  # what it wrote is still there: it was in the middle

    def _terminate(self, processes: Processes, work_dir: Path) -> bool:
        metrics = work_dir / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        if not _until(lambda: metrics.exists() and metrics.stat().st_size > before, processes):
            return False
        time.sleep(self.rng.uniform(0, 0.3))
        chosen = self.rng.choice([processes.pids, processes.pids[:1], processes.pids[1:]])
        processes.send(signal.SIGTERM, chosen)
        codes = processes.wait(60)
        if is_finished(work_dir, self.config.max_steps or 0):  # the signal came when the last step was done
            return False
        assert codes == [EXIT_PREEMPTED] * RANKS, (codes, self.log.read_text()[-3000:])
        return True


def is_finished(work_dir: Path, steps: int) -> bool:
    """Whether the last step is saved: then the run is over, or about to be."""
    return (work_dir / f"checkpoints/checkpoint-{steps}" / "manifest.json").exists()


def _until(condition: Callable[[], bool], processes: Processes) -> bool:
    """Wait for a condition; False if the processes end first."""
    while not condition():
        if processes.are_over():
            return False
        time.sleep(0.0005)
    return True


def _is_saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".tmp-checkpoint-*"))


def contents(work_dir: Path) -> dict[str, object]:
    """What a run left: tensors and counters of its last checkpoint, its snapshots, its log without times and rates."""
    found: dict[str, object] = {}
    last = list_checkpoints(work_dir / "checkpoints")[-1][1]
    assert verify(last) is None
    for path in [*last.rglob("*.safetensors"), *(work_dir / "posthoc_ema").glob("*.safetensors")]:
        found[str(path.relative_to(work_dir))] = tensors_digest(path)
    found["optimizer"] = hash_file(last / "training_state/__0_0.distcp")
    record = json.loads((last / "trainer.json").read_text())
    found["trainer.json"] = [record[key] for key in ("step", "window", "ema_updates", "samples_seen")]
    found["metrics.jsonl"] = [*_lines(work_dir / "metrics.jsonl")]
    found["left behind"] = sorted(path.name for path in work_dir.rglob(".tmp-*"))
    return found


def tensors_digest(path: Path) -> str:
    """Of names and values; the order of the entries in a safetensors header is not fixed."""
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(path).items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[dict[str, float]]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield {key: row[key] for key in ("step", "loss", "grad_norm", "lr", "epoch")}


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    return [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def extract(store: Path) -> None:
    """Features of 24 pictures, made in a process of its own: what is forked later shall not have computed yet."""
    settings = ExtractionSettings(image_size=64, dtype="fp32")
    pid = _fork(lambda: extract_folder(ROOT / "data/emoji", store, PIPELINE, settings, limit=24))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == EXIT_DONE, f"the extraction ended with {code}"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    faults = ["kill"] * args.kills + ["kill_in_save"] * args.kills_in_save + ["terminate"] * args.terminations
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(folder / "store")
        channels = json.loads((folder / "store/manifest.json").read_text())["caption_channels"]
        (folder / "config.py").write_text(
            CONFIG.format(store=str(folder / "store"), channels=channels, steps=args.steps)
        )
        config = load_config(folder / "config.py", notify=lambda line: None)
        begin = time.monotonic()
        chaos = Chaos(config, folder, args.seed)
        chaos.rng.shuffle(faults)
        chaos.run(faults)
    counts = chaos.counts
    assert counts["corrupt"] == 0, counts
    figures = {
        "kill_9": counts["kill"] + counts["kill_in_save"],
        "kill_9_in_a_save": counts["kill_in_save"],
        "sigterm": counts["terminate"],
        "starts": counts["starts"],
        "runs_compared": counts["runs"],
        "runs_bit_equal_to_the_undisturbed_one": counts["runs"],  # the first that is not ends this program
        "checkpoints_verified_after_faults": counts["verified"],
        "corrupt_checkpoints": counts["corrupt"],
        "processes": RANKS,
        "steps_a_run": args.steps,
        "seconds": round(time.monotonic() - begin),
    }
    write_report(args.out, figures)


if __name__ == "__main__":
    main()
