"""Who used what: the counters that settlements add to, by UTC day, caller and model. They are kept for 400 days.

A day is the day on which a request was admitted, so that budgets and usage agree to the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import msgspec

from .errors import InvalidRequest, Unavailable
from .store import Store, StoreError

By = Literal["key", "client", "tenant", "model"]
Who = tuple[str, str, str, str]

#: What is counted, in the order in which it is kept. `uncharged_tokens`: of cache hits that count against nothing.
COLUMNS = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cost_micro",
    "cached_requests",
    "uncharged_tokens",
    "aborted_requests",
    "estimated_requests",
)
#: At which place of a counter's name each grouping stands.
PLACES: dict[By, int] = {"key": 0, "client": 1, "tenant": 2, "model": 3}
KEEP_DAYS = 400

#: Which of the keys exist.
_THERE = """
local places = {}
for place, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 1 then places[#places + 1] = place end
end
return places
"""


def _days(days: int | tuple[date, date]) -> Iterator[int]:
    if isinstance(days, tuple):
        first, last = days
    else:
        last = datetime.now(UTC).date()
        first = last - timedelta(days=days - 1)
    if first > last or (last - first).days >= KEEP_DAYS:
        raise InvalidRequest(
            f"Usage is reported for 1 to {KEEP_DAYS} days, the first not after the last.", param="days"
        )
    for number in range((last - first).days + 1):
        day = first + timedelta(days=number)
        yield day.year * 10000 + day.month * 100 + day.day


async def _scan(store: Store, day: int) -> dict[bytes, tuple[Who, list[int]]]:
    """All counters of a day by their names in Redis; read in pieces, so that nobody is held up."""
    found: dict[bytes, tuple[Who, list[int]]] = {}
    cursor = b"0"
    while True:
        cursor, flat = await _call(store, "HSCAN", f"{store.prefix}:usage:{day}", cursor, "COUNT", 500)
        for name, counts in zip(flat[::2], flat[1::2], strict=True):
            # A scan may give an entry twice.
            found[name] = (msgspec.json.decode(name, type=Who), [int(number) for number in counts.split()])
        if cursor == b"0":
            return found


async def _call(store: Store, *words: bytes | str | int) -> Any:
    try:
        return await store.call(*words)
    except StoreError as error:
        raise Unavailable(
            "Usage cannot be reached at the moment. Please try again.", code="store_unavailable"
        ) from error


async def report(store: Store, *, days: int | tuple[date, date] = 1, by: By = "key") -> list[dict[str, Any]]:
    """Sums of the counters.

    Args:
        store: Where they are.
        days: So many days including today, or the first and the last (UTC).
        by: What to sum over.

    Returns:
        A row for each value of `by` (under that name), with COLUMNS, sorted by the tokens.

    Raises:
        InvalidRequest: `days` or `by` make no sense.
        Unavailable: Redis is away.
    """
    if by not in PLACES:
        raise InvalidRequest(f"Usage is grouped by one of {', '.join(PLACES)}.", param="by")
    place = PLACES[by]
    sums: dict[str, list[int]] = {}
    for day in _days(days):
        entries = store.usage.get(day, {}).items() if store.local else (await _scan(store, day)).values()
        for who, counts in entries:
            total = sums.setdefault(who[place], [0] * len(COLUMNS))
            for column, count in enumerate(counts):
                total[column] += count
    ordered = sorted(sums.items(), key=lambda entry: (-entry[1][1] - entry[1][2], entry[0]))
    return [{by: name, **dict(zip(COLUMNS, counts, strict=True))} for name, counts in ordered]


async def purge(store: Store, client: str) -> int:
    """Remove all counters of a client; how many were removed.

    Raises:
        Unavailable: Redis is away; counters may remain, so ask again.
    """
    removed = 0
    if store.local:
        for day in store.usage.values():
            for who in [who for who in day if who[1] == client]:
                del day[who]
                removed += 1
        return removed
    days = list(_days(KEEP_DAYS))
    keys = [f"{store.prefix}:usage:{number}" for number in days]
    for place in await _call(store, "EVAL", _THERE, len(keys), *keys):
        number = days[place - 1]
        names = [name for name, (who, _) in (await _scan(store, number)).items() if who[1] == client]
        for first in range(0, len(names), 500):
            removed += await _call(store, "HDEL", f"{store.prefix}:usage:{number}", *names[first : first + 500])
    return removed
