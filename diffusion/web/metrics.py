"""Counts for Prometheus. One registry an app, so that several may live in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = ("done", "stopped", "refused", "failed")
_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class WebMetrics:
    """pixart_requests_total by outcome, pixart_pictures_total, pixart_request_seconds, the queue, and the card."""

    def __init__(self, num_waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("pixart_requests", "Requests by outcome", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # a series that begins at 0, not at its first event
        self.pictures = Counter("pixart_pictures", "Pictures drawn", registry=self.registry)
        self.seconds = Histogram(
            "pixart_request_seconds",
            "From asking to the last picture, waiting included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        waiting = Gauge("pixart_waiting_requests", "Requests in the queue", registry=self.registry)
        waiting.set_function(num_waiting)
        self.drawing = Gauge("pixart_drawing", "1 while a picture is drawn", registry=self.registry)
        if torch.cuda.is_available():
            memory = Gauge("pixart_gpu_memory_bytes", "Allocated by torch", registry=self.registry)
            memory.set_function(torch.cuda.memory_allocated)

    def text(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
