"""A network between the gateway and Redis, with faults: answers that get lost, connections that break."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class RedisProxy:
    """Forwards to Redis. `deaf` swallows the answers; `holding` keeps back what is asked until `release`."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.deaf = False
        self.holding = False
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self.connections = 0
        #: Answers (or pieces of them) that were swallowed.
        self.swallowed = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> RedisProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Aborted sockets are closed in the loop's next rounds.
        await asyncio.sleep(0.01)

    def cut(self) -> None:
        """Break all connections at once, whatever is on its way."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def release(self) -> None:
        """Deliver what was held back, late: whoever asked may be gone."""
        self.holding = False
        held, self._held = self._held, []
        for writer, data in held:
            writer.write(data)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        back: asyncio.Task[None] | None = None
        try:
            there, other = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(other)
            back = asyncio.create_task(self._pump(there, writer, answers=True))
            await self._pump(reader, other, answers=False)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            if back is not None:
                back.cancel()
                with suppress(asyncio.CancelledError):
                    await back
            for one in (writer, other):
                if one is not None:
                    self._writers.discard(one)
                    if not any(one is late for late, _ in self._held):
                        one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.holding and not answers:
                    self._held.append((writer, data))
                elif answers and self.deaf:
                    self.swallowed += 1
                else:
                    writer.write(data)
                    await writer.drain()
