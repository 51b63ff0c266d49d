# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a server counts, for Prometheus."""

from typing import Any


# Seconds: a picture takes from a tenth of one to some minutes.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
# Pictures a call.
PICTURES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """
    The counts of one server, in a registry of its own.

    Raises:
        ImportError: Without `prometheus_client`.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
        except ImportError as error:
            raise ImportError("Serving needs prometheus_client: pip install 'diffusers-dim[serve]'") from error
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        kept: dict[str, Any] = {"registry": self.registry}
        self.open = Gauge("dim_open_requests", "Requests that are not answered to their ends.", **kept)
        self.requests = Counter("dim_requests", "Requests answered.", ["route", "status"], **kept)
        self.rejected = Counter("dim_rejected", "Requests refused, by why.", ["reason"], **kept)
        self.abandoned = Counter("dim_abandoned", "Requests given up, by why.", ["reason"], **kept)
        self.queue = Gauge("dim_queue_pictures", "Pictures that wait to be painted.", **kept)
        self.pictures = Counter("dim_pictures", "Pictures painted.", **kept)
        self.batch = Histogram("dim_batch_pictures", "Pictures in a call.", buckets=PICTURES, **kept)
        self.waiting = Histogram(
            "dim_waiting_seconds", "From a request's arrival to its call.", buckets=SECONDS, **kept
        )
        self.painting = Histogram("dim_painting_seconds", "Of a call.", buckets=SECONDS, **kept)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
