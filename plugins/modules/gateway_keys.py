#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Issue, rotate, revoke and restore the gateway's API keys in a file of hashes on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gateway_keys
short_description: Issue, rotate, revoke and restore the gateway's API keys in a file of hashes
description:
  - The file, JSON, holds an entry a key (C(id), C(prefix), C(hash), C(role) and what else the gateway knows of keys);
    it holds no key and may lie in version control. A key itself is only in this module's result, or in O(key_file).
  - Give the tasks of O(state=issued) and O(state=rotated) C(no_log), unless O(key_file) takes the key.
  - An O(id) is O(state=issued) once. Again, with the same role and so on, nothing happens and no key is shown; with
    others the entry is brought up to date and the key stays.
options:
  path:
    description: The file of hashes.
    type: path
    required: true
  state:
    description:
      - V(issued) makes a key. V(rotated) makes another for the same holder, named with a number, and lets the one
        before it expire after O(overlap_hours). V(revoked) disables it, V(restored) enables it. V(removed) takes the
        entry out.
      - V(first) is V(issued) where the file holds no key yet, and nothing where it does.
    type: str
    choices: [issued, rotated, revoked, restored, removed, first]
    required: true
  id:
    description: The key's id.
    type: str
    required: true
  settings:
    description: Further settings of an issued key (C(role), C(tenant), C(client), C(expires), C(models), ...).
    type: dict
    default: {}
  overlap_hours:
    description: How long a rotated key stays good beside its successor.
    type: int
    default: 168
  key_file:
    description: File, readable by its owner only, into which the key is written.
    type: path
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Says what would change; no key is made.
"""

EXAMPLES = r"""
- name: Issue a key
  rayplane.platform.gateway_keys:
    path: keys/ray-llm-cluster-prod.json
    state: issued
    id: team-search
    settings: {role: premium, tenant: search}
  no_log: true
  register: __gateway_issued
"""

RETURN = r"""
key:
  description: The key; empty where none was made, and where O(key_file) has it.
  type: str
  returned: always
entry:
  description: What the file says of it now.
  type: dict
  returned: always
previous:
  description: The id of the key that was rotated.
  type: str
  returned: always
actions:
  description: What was done (would be done, in check mode).
  type: list
  returned: always
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec

Json = dict[str, Any]

_PREFIX_LENGTH = 12


class KeysError(Exception):
    """The file or the request cannot be used."""


def new_key(known: set[str]) -> str:
    """A key as `serve_app.gateway.keys` makes it, whose prefix nobody has."""
    alphabet = string.ascii_lowercase + string.digits
    while True:
        prefix = secrets.choice(string.ascii_lowercase)
        prefix += "".join(secrets.choice(alphabet) for _ in range(_PREFIX_LENGTH - 1))
        if prefix not in known:
            return f"rp-{prefix}-{secrets.token_urlsafe(32)}"


def read(path: Path) -> list[Json]:
    """The entries of the file; none where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise KeysError(f"{path} cannot be read as JSON: {error}") from error
    keys = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise KeysError(f'{path} has not the form {{"keys": [...]}}')
    return keys


def write(path: Path, keys: list[Json]) -> None:
    """Replace the file as a whole: an entry a line, for version control. Readers see the old one or the new one."""
    lines = ",\n".join(f"  {json.dumps(key)}" for key in keys)
    _put(path, '{"keys": [\n' + lines + "\n]}\n" if keys else '{"keys": []}\n', 0o644)


def _put(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    Path(name).replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against others who write there."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def moment(text: str) -> datetime.datetime:
    """An RFC 3339 time, or a date as its midnight UTC."""
    parsed = datetime.datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)


def entry_of(key: str, identity: str, settings: Json) -> Json:
    """What is stored of a key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {"id": identity, "prefix": key[3 : 3 + _PREFIX_LENGTH], "hash": f"sha256:{digest}", **settings}


def successor(identity: str, taken: set[str]) -> str:
    """The id of the key that follows: `search`, `search-2`, `search-3`."""
    base, number = re.fullmatch(r"(.*?)(?:-([0-9]+))?", identity, re.DOTALL).groups()  # type: ignore[union-attr]
    count = int(number or 1) + 1
    while f"{base}-{count}" in taken:
        count += 1
    return f"{base}-{count}"


def change(
    keys: list[Json], state: str, identity: str, settings: Json, until: str
) -> tuple[list[Json], Json, str, list[str]]:
    """The entries afterwards, the entry meant, the key where one was made, and what was done.

    Raises:
        KeysError: There is no such key, or it cannot be rotated.
    """
    place = next((number for number, key in enumerate(keys) if key.get("id") == identity), None)
    if state == "first" and keys:
        return keys, {}, "", []
    if state in ("issued", "first"):
        if place is not None:
            after = {**keys[place], **settings}
            done = [f"update key {identity}"] if after != keys[place] else []
            return [*keys[:place], after, *keys[place + 1 :]], after, "", done
        key = new_key({str(other.get("prefix")) for other in keys})
        entry = entry_of(key, identity, settings)
        return [*keys, entry], entry, key, [f"issue key {identity}"]
    if place is None:
        known = ", ".join(str(key.get("id")) for key in keys) or "none"
        raise KeysError(f"there is no key {identity} in the file; it has: {known}")
    old = keys[place]
    if state == "removed":
        return [*keys[:place], *keys[place + 1 :]], old, "", [f"remove key {identity}"]
    if state == "rotated":
        if old.get("disabled"):
            raise KeysError(f"key {identity} is revoked: issue a new one instead")
        name = successor(identity, {str(key.get("id")) for key in keys})
        key = new_key({str(other.get("prefix")) for other in keys})
        # The holder stays the same for usage and audit.
        held = {name: value for name, value in old.items() if name not in ("id", "prefix", "hash", "expires")}
        entry = entry_of(key, name, {**held, "client": old.get("client") or identity, **settings})
        ends = min(until, str(old.get("expires") or until), key=moment)
        before = {**old, "expires": ends}
        actions = [f"issue key {name}", f"key {identity} expires {ends}"]
        return [*keys[:place], before, *keys[place + 1 :], entry], entry, key, actions
    after = {name: value for name, value in old.items() if name != "disabled"}
    if state == "revoked":
        after["disabled"] = True
    done = [f"{'revoke' if state == 'revoked' else 'restore'} key {identity}"] if after != old else []
    return [*keys[:place], after, *keys[place + 1 :]], after, "", done


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    path = Path(given["path"])
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=given["overlap_hours"])
    settings = {name: value for name, value in given["settings"].items() if value not in (None, "", [])}
    try:
        if not module.check_mode:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Two runs at a time would lose a key.
        with contextlib.ExitStack() as stack:
            if not module.check_mode:
                stack.enter_context(locked(path.parent))
            before = read(path)
            after, entry, key, actions = change(
                before, given["state"], given["id"], settings, until.strftime("%Y-%m-%dT%H:%M:%SZ")
            )
            if not module.check_mode and after != before:
                # The key first: a hash whose key nobody has is of no use.
                if key and given["key_file"]:
                    _put(Path(given["key_file"]), key + "\n", 0o600)
                write(path, after)
    except (KeysError, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    shown = "" if module.check_mode or given["key_file"] else key
    module.exit_json(
        changed=bool(actions),
        key=shown,
        entry=entry,
        previous=given["id"] if given["state"] == "rotated" else "",
        actions=actions,
    )


if __name__ == "__main__":
    main()
