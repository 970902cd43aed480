"""Taking over a changed configuration while the gateway runs."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from .policy import Policy, PolicyError, Seen, load, look

#: A changed file is taken as written once it has stayed the same for so long, in seconds; after `_TRIES` looks it is
#: read as it is.
SETTLE_S: Final = 0.1
_TRIES: Final = 20
#: A policy that was replaced is taken apart after so long, in seconds, when no request asks its keys any more.
RETIRE_S: Final = 60.0
#: Where no policy was ever loaded: seconds between looks.
_DEFAULT_INTERVAL_S: Final = 2.0


class Reloader:
    """Looks at the configuration's files, and hands over what is new and right.

    A file with mistakes changes nothing: the policy in force stays, and the mistakes go to `on_error`, once for each
    state of the files.

    Args:
        path: The main file.
        on_policy: Takes a new policy. Where it raises, that counts as a failed reload.
        on_error: Is told why a reload failed.

    Attributes:
        policy: The one handed over last.
        last_error: Why the last attempt failed; empty after a good one.
    """

    def __init__(
        self,
        path: Path,
        on_policy: Callable[[Policy], Awaitable[None] | None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.path = path
        self.policy: Policy | None = None
        self.last_error = ""
        self._on_policy = on_policy
        self._on_error = on_error
        self._files: tuple[Path, ...] = (path,)
        self._seen: Seen = ()
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()

    def start(self, policy: Policy | None = None) -> None:
        """Begin to look, every `server.reload_interval_s`. `policy` is the one already in force: only what changes
        after it was read is new.
        """
        if policy is not None:
            self._took(policy)
        if self._task is None:
            self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more. A reload under way is given up."""
        tasks = [self._task, *self._retired] if self._task is not None else [*self._retired]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def now(self) -> Policy:
        """Read the configuration at once, changed or not, and hand it over.

        Raises:
            PolicyError: It has mistakes; `on_error` has been told too.
        """
        async with self._one_at_a_time:
            return await self._reload()

    async def _watch(self) -> None:
        while True:
            interval = _DEFAULT_INTERVAL_S if self.policy is None else self.policy.config.server.reload_interval_s
            await asyncio.sleep(interval)
            async with self._one_at_a_time:
                if await self._changed():
                    try:
                        await self._reload()
                    except Exception:  # noqa: S112  told to on_error; the next change is another chance
                        continue

    async def _changed(self) -> bool:
        """Whether a file is not as it was, and no longer being written."""
        seen = await asyncio.to_thread(look, self._files)
        if seen == self._seen:
            return False
        for _ in range(_TRIES):
            await asyncio.sleep(SETTLE_S)
            before, seen = seen, await asyncio.to_thread(look, self._files)
            if seen == before:
                break
        return True

    async def _reload(self) -> Policy:
        try:
            policy = await asyncio.to_thread(load, self.path)
            # Also where the policy is not taken: the same files would fail the same way.
            self._files, self._seen = policy.files, policy.seen
            handed = self._on_policy(policy)
            if inspect.isawaitable(handed):
                await handed
        except Exception as error:
            if isinstance(error, PolicyError) and error.files:
                self._files, self._seen = error.files, error.seen
            self.last_error = str(error)
            self._on_error(error)
            raise
        before = self.policy
        self._took(policy)
        if before is not None and before is not policy:
            task = asyncio.create_task(self._retire(before))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)
        return policy

    def _took(self, policy: Policy) -> None:
        self.policy = policy
        self._files, self._seen = policy.files, policy.seen
        self.last_error = ""

    async def _retire(self, policy: Policy) -> None:
        """Free many keys without holding up the loop."""
        await asyncio.sleep(RETIRE_S)
        await asyncio.to_thread(policy.keys.dissolve)
