"""``daemon/metrics``."""

from __future__ import annotations

from sandboxd import protocol
from sandboxd.connection import Context
from sandboxd.handlers.table import Handler
from sandboxd.measuring import Metrics
from sandboxd.openmetrics import CONTENT_TYPE


class MetricsHandlers:
    """Figures of the daemon."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {"daemon/metrics": self.metrics}

    async def metrics(self, _: protocol.NoParams, __: Context) -> protocol.DaemonMetrics:
        """All of them, as text."""
        return protocol.DaemonMetrics(content_type=CONTENT_TYPE, text=self._metrics.text())
