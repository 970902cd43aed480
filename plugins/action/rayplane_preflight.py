# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Check everything that can be checked before a cluster is touched, and report every problem in one pass.

An action plugin, because only the controller sees all variables of a host, also those no role reads.
"""

from __future__ import annotations

import contextlib
import importlib
import linecache
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible import constants
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.modules.rayplane_preflight import DOCUMENTATION
from ansible_collections.rayplane.platform.plugins.plugin_utils.ansible_private import Origin
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import access, environment, hub, live
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.account import STAND_IN
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.images import check_images
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.platform import PLATFORMS
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import (
    ABSENT,
    Problem,
    nearest,
    render,
    split_path,
    step,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.rules import check_declared, required_tools
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import check_options, check_unknown
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.text import Respelled
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import whole

# What the live side asks with, and the modules after it too. Ansible loads an action in the process that it forks for
# every task, so this is imported once in a run; that it is missing is among the problems that are found.
with contextlib.suppress(ImportError):
    importlib.import_module("boto3")

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Roles of one platform only; every other role serves all of them.
PLATFORM_ROLES = {
    **dict.fromkeys(("account", "encryption", "network", "storage", "eks", "cost"), "aws"),
    **{"gke": "gcp", "aks": "azure"},
}
#: Roles that only hosts of a group use.
GROUP_ROLES = {"local_platform": "embedded"}
#: Facts that roles hand to each other, under their own prefix.
FACTS = (
    *(
        "account_bucket_suffix",
        "account_id",
        "eks_cluster",
        "images_ray_made",
        "models_locations",
        "network_private_subnet_ids",
        "network_public_subnet_ids",
    ),
    *(
        "network_client_cidrs",
        "network_flow_log_pending",
        "network_intra_subnet_ids",
        "network_security_group_id",
        "network_vpc_id",
    ),
)


class ActionModule(ActionBase):
    """Validate one cluster's variables and surroundings."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Collect the problems, show them, fail once."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        _validation, args = self.validate_argument_spec(argument_spec(DOCUMENTATION))
        host = str(variables["inventory_hostname"])
        project = Path(args["project"]).resolve()
        cluster = _Cluster(self, variables, project)

        found: list[Problem] = []
        if args["scope"] in ("declared", "all"):
            if host == variables.get("ansible_play_hosts_all", [host])[0]:
                found.extend(_controller(project))
            found.extend(cluster.declared())
        if args["scope"] in ("live", "all"):
            # What is wrong as declared is asked of nobody, and told once.
            wrong = {problem.variable for problem in found if not problem.warning}
            told = [problem for problem in cluster.live(ask_cluster=not wrong) if problem.variable not in wrong]
            wrong = {problem.variable for problem in told if not problem.warning}
            # Nor does a warning say again what is a problem.
            found = [problem for problem in found if not problem.warning or problem.variable not in wrong] + told
        placed = [problem if problem.where else problem.at(cluster.where(problem.variable)) for problem in found]
        return self._report(result, host, placed)

    def _report(self, result: dict[str, Any], host: str, found: list[Problem]) -> dict[str, Any]:
        problems = [problem for problem in found if not problem.warning]
        warnings = [problem for problem in found if problem.warning]
        for entries, color, is_warning in (
            (warnings, "COLOR_WARN", True),
            (problems, "COLOR_ERROR", False),
        ):
            if entries:
                self._display.display(
                    "\n" + render(entries, host, is_warning), color=constants.config.get_config_value(color)
                )
        result.update(changed=False, problem_count=len(problems), warning_count=len(warnings))
        if self._task.register or self._display.verbosity:
            result["problems"] = [problem.as_dict() for problem in problems]
            result["preflight_warnings"] = [problem.as_dict() for problem in warnings]
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            result.update(
                failed=True, msg=f"Preflight found {count} in cluster {host}, listed above. Nothing has been changed."
            )
        else:
            result["msg"] = f"Preflight found no problem in cluster {host}."
        return result


def _controller(project: Path) -> Iterator[Problem]:
    """Python, ansible-core, packages and collections: the same for every cluster, so the first one reports them."""
    metadata = environment.project_metadata(project)
    yield from environment.check_python(metadata)
    yield from environment.check_packages(metadata)
    yield from environment.check_collections(
        environment.collection_dependencies(project), environment.collection_version
    )


class _Cluster:
    """The variables of one host, its roles' defaults beneath them, and what their specs say."""

    def __init__(self, action: ActionModule, variables: Mapping[str, Any], project: Path) -> None:
        self._variables = variables
        self._project = project
        self._roles: list[str] = []
        self._options: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set(FACTS)
        defaults: dict[str, Any] = {}
        for folder in sorted((project / "roles").glob("*/")):
            options, names, values = _read_role(folder, action._loader)
            if names:
                self._roles.append(folder.name)
            self._options[folder.name] = options
            self._known |= names
            defaults.update(values)
        # Another role's defaults are no variables of this play, and templates of the inventory may name them.
        self._raw: dict[str, Any] = {**defaults, **variables}
        if variables.get("platform") == "aws":
            # The account is asked for later; names are as long with another's number.
            self._raw.setdefault("account_bucket_suffix", trust_as_template(f"-{STAND_IN}-{{{{ platform_region }}}}"))
        self._templar = action._templar.copy_with_new_env(available_variables=self._raw)
        self._values: dict[str, Any] = {}
        self._broken: dict[str, Problem] = {}
        for name in sorted(self._known):
            if name in self._raw:
                self._resolve(name)

    def _resolve(self, name: str) -> None:
        try:
            self._values[name] = _plain(self._templar.template(self._raw[name]))
        except AnsibleError as error:
            # A default fails because of a variable that is reported by itself, or waits for a fact of another role.
            text = " ".join(str(error).split())
            # Names of a role's own, set while it runs.
            if name in self._variables and "'__" not in text:
                self._broken[name] = Problem(
                    name, str(self._raw[name]), f"it cannot be resolved: {text}", self._cure(text)
                )

    def _cure(self, text: str) -> str:
        """For an undefined name: the known name most like it."""
        quoted = [part for part in text.split("'")[1::2] if f"'{part}' is undefined" in text]
        guess = nearest(quoted[-1], self._known) if quoted else None
        return f"did you mean {guess}?" if guess else "correct the expression, or define what it names"

    def declared(self) -> Iterator[Problem]:
        """What stands in the inventory: names, values, and how they fit together."""
        yield from check_unknown(self._variables, self._known, self._roles, self._variables)
        yield from self._broken.values()
        # Images of an embedded cluster lie on its only node.
        groups = {"group_names": self._variables.get("group_names", ())}
        by_rules = list(check_declared({**self._values, **groups}))
        reported = {problem.variable for problem in by_rules}
        for options in self._applicable():
            yield from (problem for problem in self._against(options) if problem.variable not in reported)
        yield from by_rules

    def live(self, ask_cluster: bool) -> Iterator[Problem]:
        """What only the outside can tell. A cluster is asked only through a kubeconfig that is sound."""
        platform, values = self._values.get("platform"), self._values
        yield from environment.check_tools(required_tools(values))
        settings = values.get("platform_module_environment") or {}
        path, context = _text(values.get("platform_kubeconfig")), _text(values.get("platform_kube_context"))
        if platform == "aws":
            yield from live.check_aws(
                settings,
                _text(values.get("platform_aws_profile")),
                _text(values.get("platform_region")),
                _text(values.get("platform_aws_endpoint_url")),
                values,
            )
            yield from access.check_own_address(values)
        if platform not in PLATFORMS:
            return
        given = platform == "existing" or values.get("kubeconfig_source") == "given"
        problems = list(live.check_kubeconfig(path, context, required=given))
        yield from problems
        # A kubeconfig that the deployment itself writes may be another cluster's until then.
        if given and not problems and ask_cluster:
            yield from live.check_cluster(path, context)
        yield from hub.check_hub(values)
        yield from live.check_model_folders(values)
        if "embedded" not in self._variables.get("group_names", ()):
            yield from check_images(values)

    def where(self, variable: str) -> str:
        """File and line of a variable, as near as its tags tell."""
        root, *rest = split_path(variable) or [""]
        if root not in self._raw:
            return ""
        # A value filled in from another variable knows that variable's place; one that was computed knows none.
        places = [Origin.get_tag(key) for key in self._raw if key == root]
        for values in (self._raw, self._values):
            value: Any = values.get(root, ABSENT)
            places.append(Origin.get_tag(value))
            for part in rest:
                value = step(value, part)
                places.append(Origin.get_tag(value) if value is not ABSENT else None)
        origin = next((place for place in reversed(places) if place is not None), None)
        if origin is None:
            return ""
        if not origin.path:
            return "command line" if "-e" in str(origin) else str(origin).strip("<>")
        path = Path(origin.path)
        short = path.relative_to(self._project) if path.is_relative_to(self._project) else path
        return f"{short}:{origin.line_num}" if origin.line_num else str(short)

    def _applicable(self) -> Iterator[Mapping[str, Any]]:
        """Specs of the roles that this cluster uses."""
        platform, groups = self._values.get("platform"), self._variables.get("group_names", ())
        for role, options in self._options.items():
            if PLATFORM_ROLES.get(role, platform) == platform and (
                role not in GROUP_ROLES or GROUP_ROLES[role] in groups
            ):
                yield options

    def _against(self, options: Mapping[str, Any]) -> Iterator[Problem]:
        resolved = {name: option for name, option in options.items() if name in self._values or name not in self._raw}
        values = {name: self._values[name] for name in resolved if name in self._values}
        problems = list(check_options(values, resolved))
        yield from problems
        if not problems:
            # What the spec says beyond types and choices: keys that exclude or need each other.
            checked = ArgumentSpecValidator(resolved).validate(values, validate_role_argument_spec=True)
            for message in checked.error_messages:
                yield Problem(_named_in(message, values), ABSENT, message, "see the role's README")


def _named_in(message: str, names: Collection[str]) -> str:
    return next((name for name in sorted(names, key=len, reverse=True) if name in message), "argument spec")


def _read_role(folder: Path, loader: Any) -> tuple[dict[str, Any], set[str], dict[str, Any]]:
    """Options of a role's first entry point, every name the role knows, and its defaults."""
    spec_file, defaults_file = folder / "meta" / "argument_specs.yml", folder / "defaults" / "main.yml"
    specs: dict[str, Any] = {}
    if spec_file.is_file():
        with spec_file.open("rb") as file:
            specs = yaml.load(file, Loader=_YamlLoader).get("argument_specs") or {}  # noqa: S506 - a safe loader, in C
    # Defaults are templates, and tell their place. Nothing here writes to them: the loader need not copy.
    defaults: dict[str, Any] = {}
    if defaults_file.is_file():
        defaults = loader.load_from_file(str(defaults_file), trusted_as_template=True, unsafe=True) or {}
    entries = {entry: (spec or {}).get("options") or {} for entry, spec in specs.items()}
    names = set(defaults).union(*entries.values())
    return dict(next(iter(entries.values()), {})), names, defaults


def _plain(value: Any) -> Any:
    """Containers of Ansible's own as plain ones; scalars keep their tags, and numbers what was written for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if whole(value) and (written := _written(value)) not in ("", str(value)):
        value = Respelled(value)
        value.written = written
    return value


def _written(value: int) -> str:
    """The text of a number in the file that it was read from; empty where that is not known."""
    origin = Origin.get_tag(value)
    if not origin or not origin.path or not origin.line_num or not origin.col_num:
        return ""
    found = re.match(r"[-+\w.:]+", linecache.getline(origin.path, origin.line_num)[origin.col_num - 1 :])
    return found[0] if found else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
