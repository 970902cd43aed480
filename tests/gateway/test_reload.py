"""A configuration that changes while the gateway runs: what is right is taken over, what is wrong changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from serve_app.gateway import keys, reload
from serve_app.gateway.config import Key
from serve_app.gateway.policy import Policy, PolicyError, Seen, load
from serve_app.gateway.reload import Reloader

from .waiting import until


def text(role: str, more: str = "") -> str:
    return f"server: {{reload_interval_s: 0.02}}\nroles: {{{role}: {{models: ['*']}}}}\n{more}"


class Watched:
    """A reloader at work, and what it said."""

    def __init__(self, path: Path) -> None:
        self.policies: list[Policy] = []
        self.errors: list[Exception] = []
        self.reloader = Reloader(path, self.policies.append, self.errors.append)

    def roles(self) -> list[str]:
        return ["+".join(one.config.roles) for one in self.policies]


async def looks(count: int) -> None:
    """Time for some looks at the files; what must not happen has had its chance."""
    await asyncio.sleep(0.02 * count + 0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "SETTLE_S", 0.01)


def run(scenario: Callable[[Watched], Awaitable[None]], path: Path) -> Watched:
    async def all_of_it() -> Watched:
        watched = Watched(path)
        watched.reloader.start(load(path))
        try:
            await scenario(watched)
        finally:
            await watched.reloader.stop()
        return watched

    return asyncio.run(all_of_it())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(text("one"))
    return path


def test_a_changed_file_is_taken_over(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        file.write_text(text("two"))
        await until(lambda: watched.roles() == ["two"])
        file.write_text(text("three"))
        await until(lambda: watched.roles() == ["two", "three"])
        assert watched.reloader.policy is watched.policies[-1]
        assert watched.reloader.last_error == ""

    assert run(scenario, file).errors == []


def test_an_unchanged_file_is_left_alone(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        await looks(10)
        assert watched.policies == [] and watched.errors == []

    run(scenario, file)


def test_a_change_between_reading_and_the_start_is_seen(file: Path) -> None:
    async def scenario() -> None:
        watched = Watched(file)
        read = load(file)
        file.write_text(text("two"))
        watched.reloader.start(read)
        await until(lambda: watched.roles() == ["two"])
        await watched.reloader.stop()

    asyncio.run(scenario())


def test_a_broken_file_changes_nothing_and_is_told_once(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        before = watched.reloader.policy
        file.write_text("roles: [")
        await until(lambda: len(watched.errors) == 1)
        await looks(10)
        assert len(watched.errors) == 1
        assert watched.policies == []
        assert watched.reloader.policy is before
        assert "is not YAML" in watched.reloader.last_error
        file.write_text(text("two", "sever: {}"))
        await until(lambda: len(watched.errors) == 2)
        assert "sever: there is no such setting" in watched.reloader.last_error
        file.write_text(text("two"))
        await until(lambda: watched.roles() == ["two"])
        assert watched.reloader.last_error == ""
        assert len(watched.errors) == 2

    run(scenario, file)


def test_a_file_that_vanishes_and_comes_back(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        file.unlink()
        await until(lambda: len(watched.errors) == 1)
        file.write_text(text("two"))
        await until(lambda: watched.roles() == ["two"])

    run(scenario, file)


def test_the_way_a_config_map_is_updated(tmp_path: Path) -> None:
    """The kubelet writes a new folder and swaps the link `..data`; the file itself is a link that never changes."""
    for name in ("one", "two"):
        folder = tmp_path / f"..{name}"
        folder.mkdir()
        (folder / "gateway.yaml").write_text(text(name))
    (tmp_path / "..data").symlink_to("..one")
    path = tmp_path / "gateway.yaml"
    path.symlink_to("..data/gateway.yaml")

    async def scenario(watched: Watched) -> None:
        (tmp_path / "..new").symlink_to("..two")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await until(lambda: watched.roles() == ["two"])

    run(scenario, path)


def test_key_files_are_watched_also_those_that_a_broken_file_names(file: Path, tmp_path: Path) -> None:
    made = keys.generate()
    more = tmp_path / "more.yaml"

    async def scenario(watched: Watched) -> None:
        file.write_text(text("two", "key_files: [more.yaml]"))
        await until(lambda: len(watched.errors) == 1)
        more.write_text(f"- {{id: a, prefix: {made.prefix}, hash: '{made.hash}', role: two}}")
        await until(lambda: len(watched.policies) == 1)
        assert watched.policies[0].keys.find(made.key, 0).id == "a"
        more.write_text("[]")
        await until(lambda: len(watched.policies) == 2)
        assert len(watched.policies[1].keys) == 0

    run(scenario, file)


def test_a_file_still_being_written_is_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file is often a good one, and another policy."""
    whole = text("two", "tenants: {a: {daily_tokens: 1}}\n")
    pieces = iter(range(40, len(whole), 10))
    real = reload.look

    def look_while_written(files: tuple[Path, ...]) -> Seen:
        file.write_text(whole[: next(pieces, len(whole))])
        return real(files)

    async def scenario(watched: Watched) -> None:
        monkeypatch.setattr(reload, "look", look_while_written)
        await until(lambda: len(watched.policies) > 0)
        monkeypatch.setattr(reload, "look", real)
        assert watched.roles() == ["two"]
        assert "a" in watched.policies[0].config.tenants

    assert run(scenario, file).errors == []


def test_a_file_that_is_written_without_end_is_read_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reload.look
    looked = 0

    def look_while_written(files: tuple[Path, ...]) -> Seen:
        nonlocal looked
        looked += 1
        file.write_text(text("two", "#" * looked))
        return real(files)

    async def scenario(watched: Watched) -> None:
        monkeypatch.setattr(reload, "look", look_while_written)
        await until(lambda: watched.roles()[:1] == ["two"])

    run(scenario, file)


def test_now_reads_whether_changed_or_not(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        first = await watched.reloader.now()
        second = await watched.reloader.now()
        assert watched.policies == [first, second]
        assert first.version == second.version
        file.write_text(text("two", "keys: {}"))
        with pytest.raises(PolicyError):
            await watched.reloader.now()
        assert watched.reloader.policy is second
        assert "keys: expected" in watched.reloader.last_error
        # The watch does not tell the same mistake again.
        await looks(10)
        assert len(watched.errors) == 1

    run(scenario, file)


def test_what_takes_policies_may_be_a_coroutine_and_may_refuse(file: Path) -> None:
    taken: list[Policy] = []
    errors: list[Exception] = []

    async def take(policy: Policy) -> None:
        await asyncio.sleep(0)
        if "two" in policy.config.roles:
            raise RuntimeError("cannot be used")
        taken.append(policy)

    async def scenario() -> None:
        reloader = Reloader(file, take, errors.append)
        reloader.start(load(file))
        file.write_text(text("two"))
        await until(lambda: len(errors) == 1)
        await looks(10)
        assert len(errors) == 1
        assert reloader.last_error == "cannot be used"
        assert reloader.policy is not None and "one" in reloader.policy.config.roles
        file.write_text(text("three"))
        await until(lambda: len(taken) == 1)
        await reloader.stop()

    asyncio.run(scenario())


def test_many_changes_at_once_are_taken_one_after_the_other(file: Path) -> None:
    async def scenario(watched: Watched) -> None:
        read = await asyncio.gather(*(watched.reloader.now() for _ in range(5)))
        assert watched.policies == list(read)

    run(scenario, file)


def test_an_old_policy_is_taken_apart_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "RETIRE_S", 0.05)
    made = keys.generate()
    file.write_text(text("one", f"keys: [{{id: a, prefix: {made.prefix}, hash: '{made.hash}', role: one}}]"))

    async def scenario(watched: Watched) -> None:
        first = watched.reloader.policy
        assert first is not None
        second = await watched.reloader.now()
        found: Key = first.keys.find(made.key, 0)
        assert found.id == "a"
        await until(lambda: len(first.keys) == 0)
        assert second.keys.find(made.key, 0) == found

    run(scenario, file)


def test_without_a_policy_in_force_the_first_look_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_DEFAULT_INTERVAL_S", 0.01)

    async def scenario() -> None:
        watched = Watched(file)
        watched.reloader.start()
        await until(lambda: watched.roles() == ["one"])
        await watched.reloader.stop()
        file.write_text(text("two"))
        await looks(5)
        assert watched.roles() == ["one"]

    asyncio.run(scenario())


def test_files_that_change_one_after_the_other_are_taken_over_together(tmp_path: Path) -> None:
    """As a volume of several ConfigMaps shows them: in between they do not belong together."""

    def entry(name: str) -> str:
        made = keys.generate()
        return f'{{"id": "{name}", "prefix": "{made.prefix}", "hash": "{made.hash}", "role": "one"}}'

    def named(*files: Path) -> str:
        digests = [f"{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
        return text("one", f"key_files: {digests}\n")

    first, second, main = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "gateway.yaml"
    both, a, b = [entry("moved"), entry("kept")], entry("moved"), entry("new")
    first.write_text(f"[{', '.join(both)}]")
    second.write_text("[]")
    main.write_text(named(first, second))

    async def scenario(watched: Watched) -> None:
        # The key has left one file and is not in the other yet: whoever has it must not be refused.
        first.write_text(f"[{both[1]}]")
        await until(lambda: len(watched.errors) == 1)
        second.write_text(f"[{a}, {b}]")
        await until(lambda: len(watched.errors) == 2)
        assert watched.policies == []
        main.write_text(named(first, second))
        await until(lambda: len(watched.policies) == 1)
        assert {key.id for key in watched.policies[0].keys} == {"moved", "kept", "new"}

    run(scenario, main)
