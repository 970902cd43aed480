"""Checks take a backend down and up again; failed requests eject it for a time that grows."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.gateway.config import Health as Settings
from serve_app.gateway.health import MAX_EJECTION, Health, watch

from .routed import run
from .waiting import until


def health(**settings: object) -> tuple[Health, list[bool], list[float]]:
    changes: list[bool] = []
    ejections: list[float] = []
    return Health(Settings(**settings), changes.append, ejections.append), changes, ejections  # type: ignore[arg-type]


def test_a_new_backend_is_used_but_not_known() -> None:
    one, _, _ = health()
    assert one.usable(0)
    assert not one.known


@pytest.mark.parametrize("error", ["", "status 500"])
def test_the_first_check_decides_alone(error: str) -> None:
    one, changes, _ = health(unhealthy_after=3, healthy_after=3)
    one.checked(error, 0)
    assert one.known
    assert one.up is (not error)
    assert changes == [not error]


def test_checks_in_a_row_take_it_down_and_up() -> None:
    one, _, _ = health(unhealthy_after=2, healthy_after=3)
    seen = []
    for error in ["", "x", "", "x", "x", "", "", "x", "", "", ""]:
        one.checked(error, 0)
        seen.append(one.up)
    assert seen == [True, True, True, True, False, False, False, False, False, False, True]
    assert one.reason == ""


def test_the_reason_is_kept() -> None:
    one, _, _ = health(unhealthy_after=1)
    one.checked("status 503", 0)
    assert one.reason == "status 503"


def test_failures_in_a_row_eject() -> None:
    one, changes, ejections = health(eject_after=3, eject_s=10)
    for _ in range(2):
        one.failed(100)
    one.succeeded()
    for _ in range(2):
        one.failed(100)
    assert one.usable(100)
    one.failed(100)
    assert one.ejected(100)
    assert one.ejected(109.9)
    assert not one.usable(109.9)
    assert one.usable(110)
    assert ejections == [10]
    assert changes == [False]


def test_after_an_ejection_the_first_request_decides() -> None:
    one, _, ejections = health(eject_after=3, eject_s=10)
    for _ in range(3):
        one.failed(100)
    one.failed(111)
    assert one.ejected(111)
    assert ejections == [10, 20]
    one.succeeded()
    one.failed(140)
    assert not one.ejected(140)


def test_ejections_grow_up_to_a_bound() -> None:
    one, _, ejections = health(eject_after=1, eject_s=10)
    now = 0.0
    for _ in range(6):
        one.failed(now)
        now = one.ejected_until
    assert ejections == [10, 20, 40, 80, 100, 100]
    assert max(ejections) == 10 * MAX_EJECTION


def test_ejections_long_ago_are_forgotten() -> None:
    one, _, ejections = health(eject_after=1, eject_s=10)
    one.failed(0)
    one.failed(20)
    one.failed(40 + 10 * MAX_EJECTION + 1)
    assert ejections == [10, 20, 10]


def test_requests_under_way_do_not_prolong_an_ejection() -> None:
    one, _, ejections = health(eject_after=1, eject_s=10)
    for now in (0, 1, 9):
        one.failed(now)
    assert ejections == [10]
    assert one.ejected_until == 10


def test_a_good_check_does_not_end_an_ejection() -> None:
    one, changes, _ = health(eject_after=1, eject_s=10)
    one.failed(0)
    one.checked("", 1)
    assert not one.usable(1)
    one.checked("", 11)
    assert one.usable(11)
    assert changes == [False, False, True]


def test_what_was_known_of_the_same_server_stays() -> None:
    old, _, _ = health(unhealthy_after=1)
    old.checked("status 500", 0)
    new, _, _ = health()
    new.take(old)
    assert (new.up, new.known, new.reason) == (False, True, "status 500")


def test_watch_checks_for_ever() -> None:
    async def main() -> None:
        one, _, _ = health(interval_s=0.01, unhealthy_after=2)
        results = iter(["", "x", "x", "", ""])
        seen: list[bool] = []

        async def check() -> str:
            seen.append(one.up)
            return next(results, "")

        task = asyncio.get_running_loop().create_task(watch(one, check))
        await until(lambda: len(seen) >= 6)
        task.cancel()
        assert seen[:6] == [True, True, True, False, True, True]

    run(main())
