"""Fixtures of the unit tests: an API server that keeps its objects in memory, and a client of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and as much time as the machine needs; `--hypothesis-profile default` looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

PROJECT = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import Cluster, Connection
    from kube_fake import Server


def connection_to(server: str, token: str = "") -> Connection:
    """A connection to a server at an address."""
    from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import Connection
    from kubernetes.client import Configuration

    def source() -> Configuration:
        configuration = Configuration(host=server)
        configuration.proxy = None
        if token:
            configuration.api_key["authorization"] = f"Bearer {token}"
        return configuration

    return Connection(source)


@pytest.fixture
def server() -> Iterator[Server]:
    """An empty API server."""
    from kube_fake import Server

    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    """The client of the API server."""
    from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import Cluster

    return Cluster(connection_to(f"http://127.0.0.1:{server.server_address[1]}"))
