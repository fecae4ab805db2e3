"""Work on a card recorded as CUDA graphs: one launch in place of thousands, of the same kernels, for the same bits."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import first_line

_logger = logging.getLogger(__name__)

Work = Callable[[Mapping[str, Tensor]], Tensor]


class RecordedWork:
    """A function of tensors, recorded once and run again on other values of the same shapes.

    The function may neither wait for the device nor copy from the host. Without a card it is called again, on the same
    fixed buffers, which serves tests.
    """

    def __init__(self, work: Work, tensors: Mapping[str, Tensor], pool: Any = None) -> None:
        """Record `work` on copies of `tensors`; pool: memory shared with other graphs that never run beside it."""
        self._work = work
        self._inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        device = next(iter(tensors.values())).device
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._record(pool)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the function gives; the tensors must have the names, shapes and dtypes of the recorded ones."""
        for name, buffer in self._inputs.items():
            buffer.copy_(tensors[name])
        if self._graph is None:
            return self._work(self._inputs).clone()
        self._graph.replay()
        return self._output.clone()  # the next replay writes over it

    def _record(self, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._work(self._inputs)  # libraries make their workspaces for this stream outside the graph
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (of a web page) may use the card meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._output = self._work(self._inputs)


class GraphCache:
    """Recorded works by key, the least recently used of which go when there are more than `limit`.

    A key is recorded when it is seen for the second time: the first run, which compiles and tunes kernels, is not
    repeated for a picture that stays the only one of its kind. Work that cannot be recorded runs as it is, which is
    said. The graphs of one cache share their memory, so they must not run beside each other.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._works: OrderedDict[Hashable, Work | None] = OrderedDict()
        self._pool: Any = None
        self._weights: Hashable = None
        self.num_recorded = 0

    def run(self, key: Hashable, work: Work, tensors: Mapping[str, Tensor], *, weights: Hashable = None) -> Tensor:
        """work(tensors), by a graph if there is one for the key and the tensors' shapes.

        Args:
            key: everything that decides what `work` does, beside the tensors.
            weights: addresses of what it reads beside them; when they change, all graphs go.
        """
        if weights != self._weights:
            self.clear()
            self._weights = weights
        signature = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())
        full_key = (key, signature)
        if full_key not in self._works:
            self._remember(full_key, None)
            return work(tensors)
        recorded = self._works[full_key]
        if recorded is None:
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            try:
                recorded = RecordedWork(work, tensors, self._pool)
            except RuntimeError as error:
                _logger.warning("no CUDA graph, the work runs by single launches: %s", first_line(_origin(error)))
                recorded = work
            self.num_recorded += isinstance(recorded, RecordedWork)
        self._remember(full_key, recorded)
        return recorded(tensors)

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._works.clear()
        self._pool = None

    def _remember(self, key: Hashable, work: Work | None) -> None:
        self._works[key] = work
        self._works.move_to_end(key)
        while len(self._works) > self._limit:
            self._works.popitem(last=False)


def _origin(error: BaseException) -> BaseException:
    """The error that a recording met: the one with which it then ends says no more than that there was one."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def addresses(module: torch.nn.Module) -> tuple[int, ...]:
    """Where the weights of a module lie; asked for with every picture, so without torch's walk, which makes names."""
    found: list[int] = []
    waiting: list[torch.nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            waiting += part._modules.values()
            found += [tensor.data_ptr() for tensor in part._parameters.values() if tensor is not None]
            found += [tensor.data_ptr() for tensor in part._buffers.values() if tensor is not None]
    return tuple(found)
