"""A Prometheus endpoint on the catalogue's metrics, fed with the same rows that ``metrics.jsonl`` holds."""

import errno
import math
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from refractor_core.telemetry.catalogue import CATALOGUE, Metric

_LOSS = "loss_"
_NOT_A_COMPONENT = {"loss_scale"}


class Exporter:
    """Serves ``/metrics`` from a thread of its own until ``close``.

    Args:
        host: address to listen on.
        port: 0 takes a free one; ``url`` says which.
        run_id: the run's name.
        config_sha: hash of the resolved config.
        version: version of this package.
        tokens: tokens of the global batches before this process, with which their counter begins: from 0 a resumed run would look as if
            it had read them all in its first step.

    Raises:
        ValueError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, *, run_id: str = "", config_sha: str = "", version: str = "", tokens: int = 0):
        self.registry = CollectorRegistry()
        self._metrics = {metric.name: _collector(metric, self.registry) for metric in CATALOGUE}
        self._tokens = tokens
        self.increment("trainer_tokens_total", tokens)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ValueError(_refusal(host, port, error)) from error
        self.port = self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        self.set("run_info", 1, run_id=run_id, config_sha=config_sha, version=version)

    def set(self, name: str, value: float | None, **labels: object) -> None:
        """Sets a gauge; ``None`` is told as NaN."""
        self._get(name, labels).set(math.nan if value is None else value)

    def increment(self, name: str, amount: float = 1, **labels: object) -> None:
        """Adds to a counter."""
        self._get(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: object) -> None:
        """Adds an observation to a histogram."""
        self._get(name, labels).observe(value)

    def observe_step(self, row: dict) -> None:
        """Takes one row of ``metrics.jsonl``. Keys that a row lacks leave their metric as it was.

        A layer's ``dropped`` is the share of its token-expert pairs; the counter tells pairs.
        """
        self.set("trainer_step", row["step"])
        self.increment("trainer_tokens_total", max(row["tokens"] - self._tokens, 0))
        self._tokens = max(row["tokens"], self._tokens)
        self.set("trainer_last_step_timestamp_seconds", time.time())
        if "loss" in row:
            self.set("trainer_loss", row["loss"], component="total")
        for key in row:
            if key.startswith(_LOSS) and key not in _NOT_A_COMPONENT:
                self.set("trainer_loss", row[key], component=key.removeprefix(_LOSS))
        for name, key in _STEP_GAUGES.items():
            if key in row:
                self.set(name, row[key])
        if row.get("step_seconds") is not None:
            self.observe("trainer_step_duration_seconds", row["step_seconds"])
        self._observe_guards(row)
        for layer in row.get("router") or ():
            self._observe_router(layer)

    def _observe_guards(self, row: dict) -> None:
        nonfinite = any(key in row and not _finite(row[key]) for key in ("loss", "grad_norm"))
        if nonfinite:
            self.increment("trainer_nonfinite_total")
        if row.get("skipped"):
            self.increment("trainer_steps_skipped_total", reason="nonfinite" if nonfinite else "other")

    def _observe_router(self, layer: dict) -> None:
        index = layer["layer"]
        self.set("moe_load_entropy_ratio", layer["load_entropy"], layer=index)
        self.set("moe_token_entropy_ratio", layer["token_entropy"], layer=index)
        self.set("moe_max_violation_ratio", layer["max_violation"], layer=index)
        self.set("moe_router_regret_ratio", layer["regret_bias"], layer=index, kind="bias")
        self.set("moe_router_regret_ratio", layer["regret_drop"], layer=index, kind="drop")
        dropped = layer["dropped"] * sum(layer["counts"]) if _finite(layer["dropped"]) else 0
        self.increment("moe_dropped_tokens_total", round(dropped), layer=index)
        for expert, count in enumerate(layer["counts"]):
            self.increment("moe_expert_tokens_total", count, layer=index, expert=expert)

    def observe_checkpoint(self, seconds: float) -> None:
        """A checkpoint is complete; ``seconds`` is what saving it took."""
        self.observe("checkpoint_save_duration_seconds", seconds)
        self.set("checkpoint_last_success_timestamp_seconds", time.time())

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def _get(self, name: str, labels: dict[str, object]):
        if name not in self._metrics:
            raise ValueError(f"metric {name!r} is not in the catalogue; declare it in refractor_core/telemetry/catalogue.py")
        collector = self._metrics[name]
        return collector.labels(**labels) if labels else collector


_STEP_GAUGES = {
    "trainer_grad_norm": "grad_norm",
    "trainer_learning_rate": "learning_rate",
    "trainer_loss_scale": "loss_scale",
    "trainer_tokens_per_second": "tokens_per_second",
    "trainer_mfu_ratio": "mfu",
}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _collector(metric: Metric, registry: CollectorRegistry) -> Gauge | Counter | Histogram:
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, metric.labels, registry=registry)
    if metric.kind == "counter":
        return Counter(metric.name, metric.help, metric.labels, registry=registry)
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"telemetry.prometheus_port = {port}: something else listens on {host}:{port}; give another port, or 0 for a free one"
    if error.errno == errno.EACCES:
        return f"telemetry.prometheus_port = {port}: not allowed to listen on {host}:{port}; give a port above 1023, or 0 for a free one"
    return f"telemetry.prometheus_host = {host!r}: cannot listen there ({error}); give an address of this machine, such as 127.0.0.1"
