"""Errors that a person reads: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PlatformError(Exception):
    """The local platform cannot go on; the message says why and what to do."""


class CommandError(PlatformError):
    """A command that was run failed; carries the end of its output."""


class CancelledError(PlatformError):
    """Work was stopped because something beside it failed."""


@dataclass(frozen=True)
class Problem:
    """One reason why this machine cannot serve, with its cure."""

    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what} Cure: {self.cure}"


class RefusedError(PlatformError):
    """The machine cannot carry the local platform: every reason at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        super().__init__(
            "this machine cannot carry the local platform; nothing was changed:\n"
            + "\n".join(lines)
            + "\nWhere that cannot be cured, use a cluster that you have: inventories/existing works with any "
            "kubeconfig (kind, k3s, minikube, a company cluster)."
        )
