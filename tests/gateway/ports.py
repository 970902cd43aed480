"""Ports that nobody else on this machine gets, and what the kernel knows of connections (Linux)."""

from __future__ import annotations

import socket
from pathlib import Path


def reserve() -> socket.socket:
    """A socket that holds a port of the loopback as long as it is open, whoever asks the kernel for a free one.

    It refuses connections until somebody listens there, which a server with SO_REUSEADDR may, again and again.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def ends(port: int, other: int) -> dict[int, tuple[int, int]]:
    """The ends that the kernel has of a connection between two ports: bytes unsent (or not acknowledged) and unread."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        local, remote = (int(word.rpartition(":")[2], 16) for word in words[1:3])
        if {local, remote} == {port, other}:
            unsent, _, unread = words[4].partition(":")
            found[local] = int(unsent, 16), int(unread, 16)
    return found


def taken(one: socket.socket) -> bool:
    """Whether the other side of a connection on this machine has read all that was written to it."""
    mine, others = one.getsockname()[1], one.getpeername()[1]
    found = ends(mine, others)
    return not found.get(mine, (0, 0))[0] and not found.get(others, (0, 0))[1]
