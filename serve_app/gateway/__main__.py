"""`rayplane-gateway --config FILE`: run the gateway alone, in front of any OpenAI-compatible backends."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_BEGAN = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, or check a configuration.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit code: 0, or 1 where the configuration has mistakes or a port is taken (said on standard error).
    """
    from . import __version__

    parser = argparse.ArgumentParser(prog="rayplane-gateway", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the configuration, YAML or JSON")
    parser.add_argument("--check", action="store_true", help="check the configuration, list all its mistakes, and end")
    parser.add_argument("--version", action="version", version=__version__)
    given = parser.parse_args(arguments)

    from .policy import PolicyError, load

    try:
        policy = load(given.config)
    except PolicyError as error:
        print(error, file=sys.stderr)
        return 1
    if given.check:
        models = len(policy.config.routes)
        print(f"{given.config}: good, version {policy.version}, {len(policy.keys)} keys, {models} models")
        return 0

    import uvloop

    from .audit import AuditFailed
    from .server import StartError, serve

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(given.config, policy, _BEGAN))
    except (StartError, AuditFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
