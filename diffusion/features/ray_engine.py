"""Extraction on a Ray cluster: the stages of `stages` as a Ray Data pipeline.

    blocks of samples -> decode (tasks on the CPUs of all nodes) -> T5, VAE, commit (actors, one a GPU) -> entries

The blocks are those of the local engine, and so are their rows and shards, whoever makes them. All nodes see the
source, the encoders and the store under the same paths (a shared file system), and have this package installed. A node
that is lost costs the blocks it was working on: Ray gives them to another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from diffusion.devices import choose_device
from diffusion.errors import ConfigError, PixArtError, first_line
from diffusion.features.conditions import load_detector
from diffusion.features.manifest import REMEDY
from diffusion.features.stages import Block, ExtractionSettings, ahead, decode_sample, encode_block
from diffusion.features.writer import FeatureStoreWriter

if TYPE_CHECKING:
    from diffusion.features.extract import Encoders

_Result = TypeVar("_Result")
_DECODING_THREADS = 2  # a task has one CPU, and now and then waits for the disk


class RayEngine:
    """The cluster of RAY_ADDRESS or of this machine (`ray start`); without one, a cluster of this machine alone.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached or has no GPU though `device` asks for one.
    """

    def __init__(self, encoders: Encoders, settings: ExtractionSettings, device: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--engine ray needs Ray ({error}); run `pip install 'pixart[ray]'`") from error
        self.encoders, self.settings, self._ray = encoders, settings, ray
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"--engine ray: no cluster ({first_line(error)}); check RAY_ADDRESS, or unset it"
                ) from error
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        if device.startswith("cuda") and not self.gpus:
            raise ConfigError(
                f"--device {device}: the Ray cluster has no GPU; add a node that has, or use --device cpu"
            )
        # Where a GPU is wanted and there, actors take one each; else each takes a CPU.
        self.on_gpu = self.gpus > 0 and device != "cpu"
        self.device = "cuda" if self.on_gpu else "cpu"
        self.nodes: set[str] = set()  # those that did a stage

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._ray.shutdown()

    def null_caption(self) -> Tensor:
        """(L0, C), T5(""), made where the actors work."""
        task = self._ray.remote(**self._resources)(_null_caption)
        return torch.from_numpy(
            self._mended(lambda: self._ray.get(task.remote(self.encoders, self.settings, self.device)))
        )

    @property
    def _resources(self) -> dict[str, Any]:
        return {"num_cpus": 0, "num_gpus": 1} if self.on_gpu else {"num_cpus": 1}

    def run(self, blocks: Sequence[Block], writer: FeatureStoreWriter) -> Iterator[int]:
        """Encode and commit blocks; see `Engine`.

        Raises:
            PixArtError: what a stage raised on any node. ConfigError: the nodes do not share one file system.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # Without a GPU the actors leave half of the CPUs to decoding, and keep one at least.
        actors = self.gpus if self.on_gpu else max(1, cpus // 2)
        pipeline = (
            ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
            # Arguments from a function keep Ray from fusing the stages, which would decode inside of the actors.
            .map(partial(_decode, settings=self.settings), num_cpus=1, ray_remote_args_fn=_spread)
            .map(
                cast(Any, _Actor),  # Ray's types know functions alone
                fn_constructor_args=(self.encoders, self.settings, self.device, writer.root.absolute()),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(blocks))),
                **self._resources,
            )
        )
        rows = iter(pipeline.iter_rows())
        while (row := self._mended(lambda: next(rows, None))) is not None:
            number = int(row["number"])
            self.nodes |= set(row["nodes"])
            try:
                writer.see_block(number)
            except OSError as error:
                raise ConfigError(
                    f"{writer.root}: block {number} was written on a node, but is not seen here ({error}); --out must "
                    "lie on a file system that all nodes share"
                ) from error
            yield number

    def _mended(self, call: Callable[[], _Result]) -> _Result:
        """A stage's own error instead of the one that Ray wraps around it."""
        wrapping = self._ray.exceptions
        try:
            return call()
        except wrapping.RayError as error:
            for inner in _causes(error):
                # Ray's error inherits from the class of its cause too, but says it in forty lines.
                if isinstance(inner, (PixArtError, OSError)) and not isinstance(inner, wrapping.RayError):
                    raise inner from error
            if isinstance(error, wrapping.RayTaskError):
                raise
            raise ConfigError(
                f"--engine ray: the cluster failed ({first_line(error)}); call the same command again to go on"
            ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop()
        if isinstance(current, BaseException) and current not in seen:
            seen.append(current)
            yield current
            waiting += [current.__cause__, getattr(current, "cause", None)]


def _null_caption(encoders: Encoders, settings: ExtractionSettings, name: str) -> Any:
    return encoders.load_text(choose_device(name), settings).encode_unpadded([""])[0].float().numpy()


def _decode(row: dict[str, Any], settings: ExtractionSettings) -> dict[str, Any]:
    """A block -> the block and its decoded pictures, which travel uncompressed: rows x 3 x px² bytes."""
    block: Block = row["block"]
    with ThreadPoolExecutor(max_workers=_DECODING_THREADS) as pool:
        decoded = list(ahead(pool, block.samples, partial(decode_sample, settings=settings), 2 * _DECODING_THREADS))
    return {"block": block, "decoded": decoded, "node": _this_node()}


def _spread() -> dict[str, Any]:
    return {"scheduling_strategy": "SPREAD"}


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


class _Actor:
    """T5 and VAE on one device; writes its blocks into the store that the driver has opened."""

    def __init__(self, encoders: Encoders, settings: ExtractionSettings, name: str, out: Path) -> None:
        device = choose_device(name)  # Ray shows an actor the one GPU that it has reserved for it
        self.settings = settings
        self.encoder, self.vae = encoders.load_text(device, settings), encoders.load_vae(device, settings)
        self.detector = load_detector(settings.condition, settings.hed_path, device)
        try:
            self.writer = FeatureStoreWriter(out, None, torch.empty(0), dtype=settings.dtype)
        except PixArtError as error:
            raise ConfigError(
                f"{error}".removesuffix(f"; {REMEDY}") + "; --out must lie on a file system that all nodes share"
            ) from error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        block: Block = row["block"]
        encoded = encode_block(block, self.settings, self.encoder, self.vae, iter(row["decoded"]), self.detector)
        self.writer.commit_block(encoded)
        return {"number": block.number, "nodes": [row["node"], _this_node()]}
