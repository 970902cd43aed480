"""Kubernetes quantities as numbers."""

from __future__ import annotations

import re
from typing import Any

_QUANTITY = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))([numkMGTPE]?|[KMGTPE]i|[eE][+-]?\d+)")
_UNITS = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3}
_UNITS |= {unit: 1000.0**power for power, unit in enumerate("MGTPE", 2)}
_UNITS |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}


def quantity(value: Any) -> float:
    """A Kubernetes quantity (``300m``, ``16Gi``, 4) as a number: cores, bytes or pieces. Raises ValueError."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no Kubernetes quantity (examples: 4, 300m, 16Gi)")
    number, unit = match.groups()
    return float(number) * _UNITS[unit] if unit in _UNITS else float(number + unit)
