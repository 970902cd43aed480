"""Puts the project's plugins on the import path, under the names that Ansible gives them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import ansible.module_utils
import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and as much time as the machine needs; `--hypothesis-profile default` looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

PROJECT = Path(__file__).resolve().parents[2]

# What comes later is found first: an action bears its module's name, and a test that imports the name means the module.
for _folder in ("plugins/filter", "plugins/action", "plugins/modules", "plugins/callback", "tools"):
    sys.path.insert(0, str(PROJECT / _folder))
# Shared code is imported as `ansible.module_utils.<name>`, in tests as in a run.
ansible.module_utils.__path__.append(str(PROJECT / "plugins" / "module_utils"))

if TYPE_CHECKING:
    from ansible.module_utils.kube_api import Cluster
    from kube_fake import Server


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
    from ansible.module_utils.kube_api import Cluster, Connection

    return Cluster(Connection(server=f"http://127.0.0.1:{server.server_address[1]}"))
