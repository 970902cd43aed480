# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over monitoring."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, quantity_problem

__all__ = ["monitoring"]

#: Prometheus' own durations, and the sizes of its operator.
_DURATION = re.compile(r"(?=\d)(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?")
_SIZE = re.compile(r"(\d+)?(B|KB|MB|GB|TB|PB|EB)?")


def monitoring(values: Values) -> Iterator[Problem]:
    """Prometheus' version, times and sizes are such as its operator takes."""
    if values.get("monitoring_enabled") is not True or values.get("monitoring_stack") != "operator":
        return
    image = values.get("monitoring_prometheus_image")
    if isinstance(image, str) and not re.search(r":v\d+\.\d+\.\d+$", image):
        reason = "its operator sets Prometheus up by its version, which is the image's tag"
        yield Problem("monitoring_prometheus_image", image, reason, "let it end in a version, such as :v3.15.1")
    for name in ("monitoring_retention", "monitoring_scrape_interval"):
        found = values.get(name)
        if isinstance(found, str) and not _DURATION.fullmatch(found):
            yield Problem(name, found, "it is no duration of Prometheus'", "write one such as 15s or 30d")
    size = values.get("monitoring_retention_size")
    if isinstance(size, str) and not _SIZE.fullmatch(size):
        yield Problem("monitoring_retention_size", size, "it is no size of Prometheus'", "write one such as 40GB")
    volume = values.get("monitoring_prometheus_volume")
    claim = volume.get("size") if isinstance(volume, dict) else None
    if claim and (found_wrong := quantity_problem(claim)):
        yield Problem("monitoring_prometheus_volume.size", claim, *found_wrong)
