"""Filters: checks on what callers ask and what models answer."""

from .base import (
    About,
    Blocked,
    Filter,
    FilterError,
    Finding,
    Phase,
    RemoteFilter,
    Stage,
    TextFilter,
    Verdict,
    problems,
)
from .chain import Chain
from .stream import StreamFilter

__all__ = [
    "About",
    "Blocked",
    "Chain",
    "Filter",
    "FilterError",
    "Finding",
    "Phase",
    "RemoteFilter",
    "Stage",
    "StreamFilter",
    "TextFilter",
    "Verdict",
    "problems",
]
