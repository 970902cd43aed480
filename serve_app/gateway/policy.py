"""Reading a configuration: files in, a checked `Policy` out, or all mistakes at once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .config import Config, Key, Role, Route
from .keys import KeyRing
from .policy_rules import Known, aliases_of, check, check_key
from .policy_shape import Problem, Problems, convert, declared

if TYPE_CHECKING:
    import yaml

#: A file's time of change (ns), size and inode; None where there is no file.
Seen = tuple[tuple[int, int, int] | None, ...]
#: A message names so many problems at most.
SHOWN: Final = 1000
#: Bytes of a key file that are decoded in one go: less than a millisecond, after which the event loop's thread may run.
_PIECE: Final = 64 * 1024
_ATTEMPTS: Final = 16
#: How a JSON file of keys begins and ends; the text inside is checked by the decoder.
_KEYS_BEGIN = re.compile(rb'\s*(\{\s*"keys"\s*:\s*)?\[(?=\s*[{\]])')
_KEYS_END = re.compile(rb"\]\s*(\})?\s*\Z")
_MARGIN: Final = 1024

__all__ = ["Policy", "PolicyError", "Problem", "load", "look"]


class PolicyError(Exception):
    """A configuration cannot be used.

    Attributes:
        problems: All of its mistakes.
        files: The files read or looked for: when one of them changes, another attempt is worth while.
        seen: Their state before they were read.
    """

    def __init__(self, problems: list[Problem], files: tuple[Path, ...] = (), seen: Seen = ()) -> None:
        super().__init__(problems)
        self.problems = problems
        self.files = files
        self.seen = seen

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [str(one) for one in self.problems[:SHOWN]]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more")
        return f"the configuration has {count} problem{'' if count == 1 else 's'}:\n" + "\n".join(lines)


class Policy:
    """A configuration that passed all checks, with what the request path looks up.

    Attributes:
        config: The main file. Its `keys` are those that stand there; `keys` below are all.
        version: 16 hexadecimal digits over the content of the main file and the key files: the same on every replica.
        keys: All keys, those of key files too.
        files: What was read, to be watched.
        seen: The files' state before they were read.
    """

    __slots__ = ("_names", "config", "files", "keys", "seen", "version")

    def __init__(
        self,
        config: Config,
        version: str = "",
        keys: KeyRing | None = None,
        files: tuple[Path, ...] = (),
        seen: Seen = (),
    ) -> None:
        self.config = config
        self.version = version
        self.keys = KeyRing(config.keys) if keys is None else keys
        self.files = files
        self.seen = seen
        self._names: dict[str, tuple[str, Route]] = {}
        for model_id, route in config.routes.items():
            for name in (model_id, *route.aliases):
                self._names[name] = (model_id, route)

    def route(self, model: str) -> tuple[str, Route] | None:
        """A model's id and route, by id or alias."""
        return self._names.get(model)

    def role(self, name: str) -> Role | None:
        """A role by name."""
        return self.config.roles.get(name)


def look(files: tuple[Path, ...]) -> Seen:
    """The state of files by which a change is seen. Links are followed: a ConfigMap's update swaps one."""
    result: list[tuple[int, int, int] | None] = []
    for file in files:
        try:
            state = file.stat()
        except OSError:
            result.append(None)
        else:
            result.append((state.st_mtime_ns, state.st_size, state.st_ino))
    return tuple(result)


def load(path: Path, *, environment: Mapping[str, str] | None = os.environ) -> Policy:
    """Read and check a configuration, YAML or JSON, and its key files.

    It may run in a thread beside the event loop: a key file of a hundred thousand keys is taken in pieces, between
    which other threads run.

    Args:
        path: The main file.
        environment: Where `*_env` variables are looked up; None: their presence is not checked (on another machine than
            the gateway's).

    Raises:
        PolicyError: With every mistake found: syntax, types, unknown names, and rules across settings.
    """
    return _Loading(Path(path), environment).run()


class _Loading:
    """One attempt: what it read, and what it found wrong."""

    def __init__(self, path: Path, environment: Mapping[str, str] | None) -> None:
        self.path = path
        self.environment = environment
        self.problems = Problems()
        self.files: list[Path] = []
        self.seen: list[tuple[int, int, int] | None] = []
        self.content = hashlib.sha256()
        self.ring = KeyRing()
        self.known = Known((), {}, {}, {})

    def run(self) -> Policy:
        data = self.read(self.path)
        raw, inline = self.parsed(self.path.name, data) if data is not None else ({}, b"")
        if self.problems:
            raise self.failed()
        # Keys are converted one by one, so that a wrong one moves no other's number.
        listed = raw.pop("keys") if isinstance(raw.get("keys"), list) else []
        config = convert(raw, Config, "", self.problems) or Config()
        self.known = Known(declared(raw, "roles"), aliases_of(config), {}, {})
        keys = self.keys_of(inline, (1, len(inline) - 1), "keys") if inline else self.slow_keys(listed, "keys")
        config = msgspec.structs.replace(config, keys=keys)
        for name in config.key_files:
            self.key_file(name)
        watched = check(config, raw, self.problems, self.environment)
        for file in watched:
            # Content that must not be guessed from the version (a backend's key) is watched, and stays out of it.
            self.watch(file if file.is_absolute() else Path.cwd() / file)
        if config.auth.issuers:
            from .tokens import prepare  # noqa: PLC0415  most gateways have no issuer

            prepare()
        if self.problems:
            raise self.failed()
        return Policy(config, self.content.hexdigest()[:16], self.ring, tuple(self.files), tuple(self.seen))

    def failed(self) -> PolicyError:
        return PolicyError(list(self.problems), tuple(self.files), tuple(self.seen))

    def watch(self, file: Path) -> None:
        self.files.append(file)
        # Before reading: what changes in between is seen as a change by the next look.
        self.seen.extend(look((file,)))

    def read(self, file: Path) -> bytes | None:
        self.watch(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self.problems.say(str(file), None, f"cannot be read: {reason}", "Give a file that the gateway may read.")
            return None
        self.content.update(b"%d:" % len(data))
        self.content.update(data)
        return data

    def parsed(self, name: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        """The main file's values; where it is JSON, its `keys` stay undecoded."""
        if data.lstrip()[:1] == b"{":
            try:
                parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            except msgspec.DecodeError as error:
                if name.endswith(".json"):
                    self.problems.say(name, None, f"is not JSON: {error}", "Correct it there.")
                    return {}, b""
            else:
                inline = bytes(parts.pop("keys", b"")) if bytes(parts.get("keys", b""))[:1] == b"[" else b""
                try:
                    return {part: msgspec.json.decode(value) for part, value in parts.items()}, inline
                except msgspec.DecodeError as error:
                    self.problems.say(name, None, f"is not JSON: {error}", "Correct it there.")
                    return {}, b""
        value = self.yaml(name, data)
        if value is None and not self.problems:
            self.problems.say(name, None, "is empty", "Declare roles, keys, backends and routes in it.")
        elif not isinstance(value, dict) and not self.problems:
            self.problems.say(name, None, "is not a mapping", "Declare roles, keys, backends and routes in it.")
        return value if isinstance(value, dict) else {}, b""

    def yaml(self, name: str, data: bytes) -> object:
        import yaml  # noqa: PLC0415

        try:
            loader = _yaml_loader()(data)
            root = loader.get_single_node()
            if root is None:
                return None
            for twice, line in _given_twice(root):
                self.problems.say(name, None, f"`{twice}` is given twice (line {line})", "Take one of the two away.")
            value: object = loader.construct_document(root)
            return value
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
            reason = getattr(error, "problem", None) or "it holds what YAML does not allow"
            self.problems.say(name, None, f"is not YAML: {reason}{where}", "Correct it there.")
        except RecursionError:
            self.problems.say(name, None, "is nested too deeply", "Correct it there.")
        return None

    def key_file(self, name: str) -> None:
        name, _, digest = name.partition("#sha256=")
        data = self.read(self.path.parent / name)
        if data is None:
            return
        if digest and hashlib.sha256(data).hexdigest() != digest:
            self.problems.say(
                name,
                None,
                "is not the file that the configuration was written with",
                "Put both in place: they are taken over together.",
            )
            return
        begin, end = _KEYS_BEGIN.match(data), _KEYS_END.search(data, max(0, len(data) - _MARGIN))
        if begin is not None and end is not None and bool(begin[1]) == bool(end[1]):
            # By far the largest files are such: neither copied nor scanned as a whole, which would hold up other
            # threads.
            self.keys_of(data, (begin.end(), end.start()), f"{name}: keys")
            return
        value = self.any(name, data)
        if isinstance(value, dict):
            for part in value.keys() - {"keys"}:
                self.problems.say(f"{name}: {part}", None, "there is no such setting", "A key file holds `keys` alone.")
        listed = value.get("keys", []) if isinstance(value, dict) else value
        if not isinstance(listed, list):
            if not self.problems:
                self.problems.say(
                    name, None, "is no list of keys", "Write a list, or a mapping with the list under `keys`."
                )
            return
        self.slow_keys(listed, f"{name}: keys")

    def keys_of(self, data: bytes, span: tuple[int, int], where: str) -> list[Key]:
        """Decode and check what stands between the brackets of a JSON list of keys, a piece at a time."""
        result: list[Key] = []
        number = 0
        for piece in self.pieces(data, *span, where):
            try:
                keys: list[Key] = msgspec.json.decode(piece, type=list[Key])
            except msgspec.ValidationError:
                for one in msgspec.json.decode(piece):
                    key = self.slow_key(one, f"{where}[{number}]")
                    if key is not None:
                        result.append(key)
                    number += 1
            else:
                for key in keys:
                    self.take(key, f"{where}[{number}]")
                    number += 1
                result += keys
            time.sleep(0)
        return result

    def pieces(self, data: bytes, start: int, end: int, where: str) -> Iterator[bytes]:
        """Cut a JSON list of objects into shorter lists.

        A border is a comma behind a brace. Whether it is one of the list itself, and not of an object or a text in it,
        the decoder tells: only up to such a border does the piece alone make a whole list.
        """
        while start < end:
            border = min(start + _PIECE, end)
            for attempt in itertools.count():
                border = data.find(b"},", border, end)
                if border < 0:
                    piece = b"[" + data[start:end] + b"]"
                    border = end
                else:
                    piece = b"[" + data[start : border + 1] + b"]"
                try:
                    msgspec.json.decode(piece, type=list[msgspec.Raw])
                except msgspec.DecodeError as error:
                    if border < end:
                        # Where no border is found soon, ever longer pieces: a malformed file must not take for ever.
                        border += 1 if attempt < _ATTEMPTS else border - start
                        continue
                    self.problems.say(where, None, f"is not JSON: {error}", "Correct it there.")
                    return
                break
            yield piece
            start = border + 2

    def any(self, name: str, data: bytes) -> object:
        """A file's values, whatever they are."""
        if data.lstrip()[:1] in {b"{", b"["}:
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(data)
        return self.yaml(name, data)

    def slow_keys(self, listed: list[object], where: str) -> list[Key]:
        found = (self.slow_key(one, f"{where}[{number}]") for number, one in enumerate(listed))
        return [key for key in found if key is not None]

    def slow_key(self, one: object, where: str) -> Key | None:
        key = convert(one, Key, where, self.problems)
        if key is not None:
            self.take(key, where)
        return key

    def take(self, key: Key, where: str) -> None:
        if check_key(key, where, self.known, self.problems):
            self.ring.add(key)


@functools.cache
def _yaml_loader() -> type[yaml.CSafeLoader]:
    """YAML as people mean it: `on`, `off`, `yes`, `no` and times are texts, as in YAML 1.2."""
    import yaml  # noqa: PLC0415

    class Loader(yaml.CSafeLoader):
        """libyaml's parser with other implicit types."""

    left_out = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in left_out]
        for first, known in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
    return Loader


def _given_twice(root: yaml.Node) -> list[tuple[str, int]]:
    """Names that stand twice in one mapping, with their line: YAML forbids it, and the parser takes the last."""
    import yaml  # noqa: PLC0415

    found = []
    known = {id(root)}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            names = set()
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                    if name.value in names:
                        found.append((name.value, name.start_mark.line + 1))
                    names.add(name.value)
            inner = [one for pair in node.value for one in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        for one in inner:
            if id(one) not in known:
                known.add(id(one))
                waiting.append(one)
    return found
