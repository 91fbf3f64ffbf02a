"""Which endpoint a request goes to, and who is next: a queue before several endpoints.

A request goes to the endpoint that its record was at last, whose cache may hold the beginning of its prompt; if that
one has no place, to the least loaded one that has. When all are full it waits. A place that becomes free goes to
the lowest priority (the oldest record) waiting; to one that is at home elsewhere only if it is older than all others by
more than `patience` records, or if no other waits. So no endpoint is idle while a request waits.

A record is known by its priority, which all its requests share, whatever their prompts look like.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence

from pipeline.engines.endpoints import Endpoint

KEPT_HOMES = 65_536
_LOG = logging.getLogger(__name__)
Waiter = tuple[int, int, asyncio.Future[Endpoint]]


class Pool:
    """Places at endpoints. Those that are out are taken only while all are. patience: in records, see above."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self._patience = sum(endpoint.limit.maximum for endpoint in endpoints)
        self._waiting: dict[Endpoint | None, list[Waiter]] = {None: [], **{endpoint: [] for endpoint in endpoints}}
        self._arrivals = itertools.count()
        self._homes: OrderedDict[int, Endpoint] = OrderedDict()
        self._probes: dict[Endpoint, asyncio.Task[None]] = {}

    def usable(self) -> list[Endpoint]:
        """Those that are in, or all if none is."""
        return [endpoint for endpoint in self.endpoints if not endpoint.is_out] or list(self.endpoints)

    async def take(self, priority: int, avoid: Endpoint | None = None) -> Endpoint:
        """A place, to be given back. avoid: another one is taken if it has a place."""
        home = self._homes.get(priority)
        free = [endpoint for endpoint in self.usable() if endpoint.has_place()]
        free = [endpoint for endpoint in free if endpoint is not avoid] or free
        if free:
            found = home if home in free else min(free, key=lambda endpoint: endpoint.load)
            assert found is not None
            found.in_flight += 1
        else:
            found = await self._wait(priority, home)
        self._homes[priority] = found
        self._homes.move_to_end(priority)
        if len(self._homes) > KEPT_HOMES:
            self._homes.popitem(last=False)
        return found

    async def _wait(self, priority: int, home: Endpoint | None) -> Endpoint:
        turn: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting[home], (priority, next(self._arrivals), turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(turn.result())
            raise

    def give(self, endpoint: Endpoint) -> None:
        """Gives a place back, and all places that are free to those who wait."""
        endpoint.in_flight -= 1
        if endpoint.is_out:
            self._probe(endpoint)
        self._hand_out()

    def rest(self, endpoint: Endpoint, seconds: float) -> None:
        """Sends nothing to the endpoint for a while."""
        if not seconds:
            return
        endpoint.resting = max(endpoint.resting, time.monotonic() + seconds)
        asyncio.get_running_loop().call_later(seconds + 0.001, self._hand_out)

    def _hand_out(self) -> None:
        for endpoint in self.usable():
            while endpoint.has_place() and (turn := self._next(endpoint)):
                endpoint.in_flight += 1
                turn.set_result(endpoint)

    def _next(self, endpoint: Endpoint) -> asyncio.Future[Endpoint] | None:
        """Who of those waiting gets a place at the endpoint."""
        best: tuple[int, int] | None = None
        best_home: Endpoint | None = None
        for home, heap in self._waiting.items():
            while heap and heap[0][2].done():
                heapq.heappop(heap)
            if heap:
                is_elsewhere = home is not None and home is not endpoint and not home.is_out
                rank = (heap[0][0] + self._patience * is_elsewhere, heap[0][1])
                if best is None or rank < best:
                    best, best_home = rank, home
        return None if best is None else heapq.heappop(self._waiting[best_home])[2]

    def leave_out(self, endpoint: Endpoint, trouble: str) -> None:
        endpoint.is_out, endpoint.trouble = True, trouble
        self._probe(endpoint)

    def _probe(self, endpoint: Endpoint) -> None:
        """Looks after an endpoint that is out, in the background; a lone one is tried by the requests themselves."""
        if len(self.endpoints) > 1 and endpoint not in self._probes:
            _LOG.warning("%s is out (%s); the others go on without it", endpoint.origin, endpoint.trouble)
            self._probes[endpoint] = asyncio.create_task(self._bring_back(endpoint))

    async def _bring_back(self, endpoint: Endpoint) -> None:
        await endpoint.wait_until_back()
        del self._probes[endpoint]
        _LOG.warning("%s is back", endpoint.origin)
        self._hand_out()

    async def close(self) -> None:
        """Ends the probes and the connections."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.close()
