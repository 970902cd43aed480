# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Declared variables against the argument specs of the roles: names, types, choices, nested options."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem, nearest

__all__ = [
    "KINDS",
    "REMOVED_VARIABLES",
    "check_options",
    "check_unknown",
    "entry_options",
    "from_text",
    "misspelt_likeness",
    "name_of",
]

_MODULES = Path(__file__).resolve().parents[2] / "modules"

#: Variables of earlier releases: old name to (new name or "", release that dropped it).
REMOVED_VARIABLES: dict[str, tuple[str, str]] = {"eks_public_access_cidrs": ("eks_endpoint_public_cidrs", "0.1.0")}

#: Lists whose entries a module takes as they are: the module and its option. Its documentation says what an entry has.
ENTRIES_OF_MODULES = {
    "autoscaler_schedules": ("eks_node_group_schedules", "schedules"),
    "eks_access_entries": ("eks_access_entries", "entries"),
    "eks_addons": ("eks_addons", "addons"),
    "eks_extra_node_groups": ("eks_node_groups", "node_groups"),
    "eks_extra_roles": ("aws_iam_roles", "roles"),
    "eks_node_groups": ("eks_node_groups", "node_groups"),
    "eks_pod_identities": ("eks_pod_identities", "associations"),
    "storage_efs_file_systems": ("aws_file_systems", "file_systems"),
}

#: What Kubernetes takes, in variables of many roles, by their names.
ENTRIES_OF_KUBERNETES: dict[str, dict[str, Any]] = {
    r"([a-z_]+_|.*\.)tolerations": {
        "key": {},
        "operator": {"choices": ["Exists", "Equal", "Lt", "Gt"]},
        "value": {},
        "effect": {"choices": ["NoSchedule", "PreferNoSchedule", "NoExecute", ""]},
        "tolerationSeconds": {"type": "int"},
    },
    r"[a-z_]+_resources": {"requests": {"type": "dict"}, "limits": {"type": "dict"}, "claims": {"type": "list"}},
}

#: Likeness from which a variable without one of our prefixes is taken for a slip of the pen.
misspelt_likeness = 0.87

# Names that Ansible itself puts among a host's variables; those that start with ansible_ are told by their prefix.
_MAGIC = frozenset(
    {
        *("environment", "group_names", "groups", "hostvars", "inventory_dir", "inventory_file", "inventory_hostname"),
        *("inventory_hostname_short", "omit", "parent_role_names", "parent_role_paths", "play_hosts", "playbook_dir"),
        *("port", "remote_user", "role_name", "role_names", "role_path", "vars"),
    }
)

#: Kinds of values: what a person calls them, and an example.
KINDS: dict[str, tuple[str, str]] = {
    "bool": ("true or false", "true"),
    "int": ("a whole number", "3"),
    "float": ("a number", "0.5"),
    "str": ("text", '"text"'),
    "path": ("a path", '"/path"'),
    "list": ("a list", "[one, two]"),
    "dict": ("a mapping", "{key: value}"),
}


@functools.cache
def entry_options(variable: str) -> Mapping[str, Any]:
    """What a mapping, or an entry of a list, takes, as a spec's ``options``; empty where its spec alone says that."""
    if variable not in ENTRIES_OF_MODULES:
        return next((found for name, found in ENTRIES_OF_KUBERNETES.items() if re.fullmatch(name, variable)), {})
    module, option = ENTRIES_OF_MODULES[variable]
    # The text alone: loading the module would load an SDK.
    source = (_MODULES / f"{module}.py").read_text(encoding="utf-8")
    documentation = source.partition('DOCUMENTATION = r"""')[2].partition('"""')[0]
    options: Mapping[str, Any] = argument_spec(documentation)[option]["options"]
    return options


def check_unknown(
    names: Iterable[str],
    known: Collection[str],
    roles: Collection[str],
    values: Mapping[str, Any],
    removed: Mapping[str, tuple[str, str]] = REMOVED_VARIABLES,
) -> Iterator[Problem]:
    """Report every name that carries a role's prefix, or nearly a known name, and that no role knows."""
    prefixes = tuple(f"{role}_" for role in sorted(roles))
    for name in sorted(names):
        if name in known or name.startswith(("_", "ansible_", "molecule_")) or name in _MAGIC:
            continue
        value = values.get(name, ABSENT)
        if name in removed:
            new, release = removed[name]
            cure = f"rename it to {new}" if new else "delete it"
            yield Problem(name, value, f"the variable was dropped in release {release}", cure)
        elif name.startswith(prefixes):
            role = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len).rstrip("_")
            guess = _nearest_variable(name, role, known)
            cure = f"did you mean {guess}?" if guess else f"delete it, or see the variables of the role {role}"
            yield Problem(
                name, value, f"no such variable: names that start with {role}_ belong to the role {role}", cure
            )
        elif guess := nearest(name, known, misspelt_likeness):
            yield Problem(
                name,
                value,
                f"nothing reads this variable, and its name is nearly that of {guess}",
                f"write {guess}; if the variable is one of your own, give it a name that is less alike",
            )


def _nearest_variable(name: str, role: str, known: Iterable[str]) -> str | None:
    """The role's variable whose rest is most alike (a prefix alone is no likeness), else one very much alike."""
    prefix = f"{role}_"
    rests = [other.removeprefix(prefix) for other in known if other.startswith(prefix)]
    rest = nearest(name.removeprefix(prefix), rests)
    return f"{prefix}{rest}" if rest else nearest(name, known, misspelt_likeness)


def check_options(values: Mapping[str, Any], options: Mapping[str, Any], path: str = "") -> Iterator[Problem]:
    """Check a mapping of values against a spec's ``options``; ``path`` is the mapping's own name, empty at the top."""
    if path:
        yield from _unknown_keys(values, options, path)
    for name, option in options.items():
        where = f"{path}.{name}" if path else name
        value = _given(values, name, option)
        if value is ABSENT or value is None:
            if option.get("required"):
                found = ABSENT if value is ABSENT else None
                yield Problem(
                    where, found, "it is required and has no default", f"set it{_choices(option)}{_about(option)}"
                )
            continue
        yield from _value(where, value, option)


def _given(values: Mapping[str, Any], name: str, option: Mapping[str, Any]) -> Any:
    for key in (name, *option.get("aliases", ())):
        if key in values:
            return values[key]
    return ABSENT


def _unknown_keys(values: Mapping[str, Any], options: Mapping[str, Any], path: str) -> Iterator[Problem]:
    known = set(options).union(*(option.get("aliases", ()) for option in options.values()))
    for key in values:
        if key not in known:
            guess = nearest(str(key), sorted(known))
            cure = f"did you mean {guess}?" if guess else f"delete it; known keys are {', '.join(sorted(known))}"
            yield Problem(f"{path}.{key}", values[key], "no such key here", cure)


def _value(path: str, value: Any, option: Mapping[str, Any]) -> Iterator[Problem]:
    kind = option.get("type", "str")
    if wrong := _type_problem(path, value, kind):
        yield wrong
        return
    choices = option.get("choices")
    if choices is not None:
        for one in value if kind == "list" else [value]:
            if one not in choices:
                guess = nearest(str(one), [str(choice) for choice in choices])
                hint = f"; did you mean {guess}?" if guess else ""
                yield Problem(
                    path, one, "it is none of the values this variable takes", f"choose one of {_join(choices)}{hint}"
                )
    if kind == "list":
        yield from _elements(path, value, option)
    elif kind == "dict" and (options := option.get("options") or entry_options(path)):
        yield from check_options(value, options, path)


def _elements(path: str, value: Iterable[Any], option: Mapping[str, Any]) -> Iterator[Problem]:
    kind = option.get("elements", "raw")
    for index, element in enumerate(value):
        where = f"{path}[{index}]"
        if wrong := _type_problem(where, element, kind):
            yield wrong
        elif kind == "dict" and (options := option.get("options") or entry_options(path)):
            yield from check_options(element, options, where)


def _type_problem(path: str, value: Any, kind: str) -> Problem | None:
    """Ansible converts a text for the check, then hands the role the text: so a type must be right as it stands."""
    fits = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "str": isinstance(value, str | int) and not isinstance(value, bool),
        "path": isinstance(value, str),
        "list": isinstance(value, list | tuple),
        "dict": isinstance(value, Mapping),
    }
    if fits.get(kind, True):
        return None
    wanted, example = KINDS[kind]
    root = path.split(".", maxsplit=1)[0].split("[", maxsplit=1)[0]
    if isinstance(value, str) and kind in ("bool", "int", "float", "list", "dict"):
        example = from_text(value, kind) or example
        cure = f"write {example} without quotes"
        if root == path:
            # Ansible splits name=value at spaces; JSON has room for any value.
            cure += f"; on the command line: -e '{{\"{root}\": {example}}}'"
        return Problem(path, value, f"it is text and must be {wanted}", cure)
    if kind == "str" and isinstance(value, bool | float):
        return Problem(
            path,
            value,
            f"YAML reads it as {name_of(value)}, and it must be text",
            f'put it in quotes, as you mean it: {path}: "..."',
        )
    return Problem(path, value, f"it is {name_of(value)} and must be {wanted}", f"write {example}, for example")


def from_text(text: str, kind: str) -> str:
    """What the text was meant to be, where that is plain."""
    word = text.strip()
    if kind == "bool" and word.lower() in ("true", "yes", "on", "1", "y", "t"):
        return "true"
    if kind == "bool" and word.lower() in ("false", "no", "off", "0", "n", "f"):
        return "false"
    if kind in ("list", "dict"):
        with contextlib.suppress(yaml.YAMLError):
            read = yaml.safe_load(word)
            if isinstance(read, {"list": list, "dict": dict}[kind]):
                return json.dumps(read, default=str)
        return json.dumps([part.strip() for part in word.split(",")]) if kind == "list" and word else ""
    try:
        return str(int(word)) if kind == "int" else word if kind == "float" and float(word) >= 0 else ""
    except ValueError:
        return ""


def name_of(value: Any) -> str:
    """What YAML read, as a person calls it."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, datetime.date):
        return "a date"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _choices(option: Mapping[str, Any]) -> str:
    return f" to one of {_join(option['choices'])}" if option.get("choices") else ""


def _about(option: Mapping[str, Any]) -> str:
    text = option.get("description", "")
    first = text[0] if isinstance(text, list | tuple) and text else text
    return f": {str(first).rstrip('.')}" if first else ""


def _join(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
