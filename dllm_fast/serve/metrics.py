"""What ``/metrics`` tells Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dllm_fast.serve.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
FORWARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """A registry of its own, so that a process may hold several servers."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("dllm_fast_requests", "answered HTTP requests", ["path", "status"], **own)
        self.gone = Counter("dllm_fast_requests_abandoned", "requests whose client left before the end", **own)
        self.prompt_tokens = Counter("dllm_fast_prompt_tokens", "tokens of prompts", **own)
        self.tokens = Counter("dllm_fast_completion_tokens", "tokens of answers", **own)
        self.forwards = Counter("dllm_fast_forwards", "forwards that the answers' rows took, each as if alone", **own)
        self.seconds = Histogram("dllm_fast_request_seconds", "from request to last token", buckets=SECONDS, **own)
        self.first = Histogram("dllm_fast_first_block_seconds", "to the first block", buckets=SECONDS, **own)
        self.nfe = Histogram("dllm_fast_nfe", "forwards of an answer", buckets=FORWARDS, **own)
        gauges = {
            "seats": ("rows that run at a time", lambda: worker.served.seats),
            "seated_rows": ("rows that run", lambda: worker.load.seated),
            "waiting_rows": ("rows that wait for a seat", lambda: worker.load.waiting),
            "worker_up": ("whether the process with the model runs", lambda: worker.up),
            "worker_restarts": ("how often it died and was started again", lambda: worker.restarts),
        }
        for name, (meaning, value) in gauges.items():
            Gauge(f"dllm_fast_{name}", meaning, **own).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
