"""Forward and backward passes as CUDA graphs, for small batches: their launches take longer than their work.

A pass is recorded when its kind and shapes are seen for the second time, and is then one launch instead of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion.data import TrainBatch
from diffusion.graphs import GraphCache
from diffusion.models import pad_captions

MAX_GRAPHS = 128  # a table of aspect ratios has about 40 shapes

Gradients = dict[nn.Parameter, Tensor]


class RecordedPasses:
    """Runs `compute` on batches, by graphs where they exist.

    `compute` (batch -> its detached loss) leaves gradients in the parameters, and may neither wait for the device nor
    let anything decide that the key does not tell. All graphs write to one set of gradients, so that many shapes take
    the memory of one.

    Args:
        parameters: of the network; those that train.
        caption_length: to which captions are padded, so that batches differ in few shapes.
    """

    def __init__(
        self, compute: Callable[[TrainBatch], Tensor], parameters: Iterable[nn.Parameter], caption_length: int
    ) -> None:
        self._compute, self._caption_length = compute, caption_length
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._cache = GraphCache(MAX_GRAPHS)
        self._gradients: Gradients = {}  # where graphs put them
        self._written: dict[Hashable, list[nn.Parameter]] = {}  # by the graph of a key

    @property
    def num_recorded(self) -> int:
        """Graphs so far."""
        return self._cache.num_recorded

    def run(self, batch: TrainBatch, key: Hashable, *, is_first: bool) -> Tensor:
        """Loss of a batch, (); its gradients are added to those of the step, or with `is_first` take their place.

        Args:
            key: what the host decides about the pass; None = it cannot be recorded.
        """
        embeds, mask = pad_captions(batch.caption_embeds, batch.caption_mask, self._caption_length)
        batch = replace(batch, caption_embeds=embeds, caption_mask=mask)
        earlier = {} if is_first else {p: p.grad.clone() for p in self._parameters if p.grad is not None}
        loss = self._pass(batch) if key is None else self._by_graph(batch, key)
        _add(self._parameters, earlier)
        return loss

    def _by_graph(self, batch: TrainBatch, key: Hashable) -> Tensor:
        tensors = batch.tensors()
        key = (key, tuple((name, value.shape, value.dtype) for name, value in tensors.items()))

        def work(given: Mapping[str, Tensor]) -> Tensor:
            # What is no tensor would stay that of the batch that was recorded.
            loss = self._pass(replace(batch, keys=[], **given))  # type: ignore[arg-type]
            self._written.pop(key, None)
            if loss.is_cuda and torch.cuda.is_current_stream_capturing():
                self._written[key] = self._keep_gradients()
            return loss

        loss = self._cache.run(key, work, tensors)
        if key in self._written:
            for parameter in self._parameters:
                parameter.grad = None
            for parameter in self._written[key]:
                parameter.grad = self._gradients[parameter]
        return loss

    def _pass(self, batch: TrainBatch) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        return self._compute(batch)

    def _keep_gradients(self) -> list[nn.Parameter]:
        """Within a recording: let it end with its gradients in the shared set; returns whose they are."""
        written = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        known = [parameter for parameter in written if parameter in self._gradients]
        if known:
            torch._foreach_copy_([self._gradients[p] for p in known], [written[p] for p in known])
        self._gradients = {**written, **self._gradients}
        return list(written)


def _add(parameters: Iterable[nn.Parameter], earlier: Gradients) -> None:
    """Add gradients of earlier micro-batches to those that the parameters have now."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = earlier.pop(parameter, None)
    if earlier:
        torch._foreach_add_([p.grad for p in earlier if p.grad is not None], list(earlier.values()))
