#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ask and change a gateway that runs, through its admin API."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gateway_admin
short_description: Ask and change a gateway that runs, through its admin API
description:
  - The admin API is reached through the proxy of the Kubernetes API server, so it needs no way in of its own. The key
    for it is read from a Secret and is in no argument and no result.
  - Revocations, weights and canaries are kept in the gateways' shared store and reach every replica within seconds.
    Where there is none (O(shared=false)), every pod is told.
options:
  namespace:
    description: Namespace of the gateway.
    type: str
    required: true
  service:
    description: Its admin Service.
    type: str
    required: true
  port:
    description: Port of the admin API.
    type: int
    default: 9090
  secret:
    description: The Secret (key C(key)) with a key whose role may use the admin API.
    type: str
    required: true
  selector:
    description: Labels of the gateway's pods.
    type: str
    required: true
  shared:
    description: Whether the replicas share a store.
    type: bool
    default: true
  version:
    description: >-
      Wait until every pod works by the configuration of this version. The kubelets are made to look at the ConfigMap at
      once.
    type: str
    default: ""
  timeout:
    description: Seconds to wait.
    type: int
    default: 120
  revoked:
    description: Ids of keys that shall be refused from now on.
    type: list
    elements: str
    default: []
  restored:
    description: Ids of keys of which a revocation shall be taken back.
    type: list
    elements: str
    default: []
  weights:
    description: >-
      By model, the weight of each backend, in place of the configuration's. A backend that is not named keeps its
      weight. Nothing (an empty mapping or null) takes all of a model's weights back.
    type: dict
    default: {}
  canaries:
    description: >-
      By model, the percentage of the callers that the route's canary gets, in place of the configuration's. Nothing (an
      empty text or null) takes it back.
    type: dict
    default: {}
  query:
    description: What to ask for.
    type: list
    elements: str
    choices: [keys, routes, status]
    default: []
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Asks, changes nothing, and waits for nothing.
"""

EXAMPLES = r"""
- name: Give a tenth of the traffic to another cluster
  rayplane.platform.gateway_admin:
    namespace: rayplane
    service: gateway-admin
    secret: gateway-operator
    selector: app.kubernetes.io/name=gateway
    weights: {llama-3-8b: {llama-3-8b: 90, other-cluster: 10}}
"""

RETURN = r"""
actions:
  description: What was changed (would be, in check mode).
  type: list
  returned: always
answers:
  description: The answer to each question of O(query).
  type: dict
  returned: always
waited_s:
  description: Seconds until every pod had the configuration.
  type: float
  returned: always
"""

import base64
import contextlib
import time
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    Json,
    KubeError,
    Resource,
    connection_from_environment,
)

_PODS = Resource("v1", "Pod", "pods", True)
_SECRETS = Resource("v1", "Secret", "secrets", True)
_ANNOTATION = "rayplane.io/configuration"
#: Seconds from one look of the kubelets to the next.
_LOOK_S = 2.0


class AdminError(Exception):
    """The admin API cannot be reached, or refuses."""


class Admin:
    """The admin API of one gateway, behind the API server's proxy."""

    def __init__(self, cluster: Cluster, given: Json) -> None:
        self.cluster = cluster
        self.namespace = given["namespace"]
        self.port = given["port"]
        self.service = given["service"]
        self.selector = given["selector"]
        self.shared = given["shared"]
        found = cluster.get(_SECRETS, self.namespace, given["secret"])
        if not found or not (found.get("data") or {}).get("key"):
            raise AdminError(
                f"there is no Secret {self.namespace}/{given['secret']} with a key for the admin API: deploy the"
                " gateway first (--tags gateway)"
            )
        self.headers = {"x-rayplane-key": base64.b64decode(found["data"]["key"]).decode()}

    def pods(self) -> list[Json]:
        """The pods that run and are not about to end."""
        return [
            pod
            for pod in self.cluster.list(_PODS, self.namespace, self.selector)
            if pod.get("status", {}).get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
        ]

    def ask(self, method: str, path: str, body: Any = None, pod: str = "") -> Any:
        """One request to the Service, or to one pod. Raises AdminError with the gateway's own words."""
        place = f"pods/{pod}:{self.port}" if pod else f"services/http:{self.service}:{self.port}"
        address = f"/api/v1/namespaces/{self.namespace}/{place}/proxy/admin/v1/{path}"
        try:
            return self.cluster.request(method, address, body, headers=self.headers)
        except ApiError as error:
            said = error.body.get("error")
            text = said.get("message") if isinstance(said, dict) else None
            raise AdminError(f"{method} /admin/v1/{path}: {text or error}") from error

    def all_keys(self) -> list[Json]:
        """Every key that the gateway knows, in pages."""
        found: list[Json] = []
        after = ""
        while True:
            page = self.ask("GET", f"keys?limit=1000{after}")
            found += page["keys"]
            if not page["after"]:
                return found
            after = f"&after={quote(page['after'], safe='')}"

    def tell(self, method: str, path: str, body: Any = None) -> None:
        """A change: once where the replicas share it, else to every pod."""
        if self.shared:
            self.ask(method, path, body)
            return
        for pod in self.pods():
            self.ask(method, path, body, pod["metadata"]["name"])

    def take_over(self, version: str, timeout: float) -> float:
        """Wait until every pod works by a version of the configuration; gives the seconds it took."""
        started, looks = time.monotonic(), 0
        while True:
            left = self.behind(version)
            waited = time.monotonic() - started
            if not left:
                return waited
            if waited > timeout:
                said = "; ".join(left.values())
                raise AdminError(f"after {waited:.0f} s not every pod has taken the configuration over: {said}")
            if waited >= looks * _LOOK_S:
                looks += 1
                for name in left:
                    self.look(name, f"{version} {looks}")
            time.sleep(0.25)

    def look(self, pod: str, mark: str) -> None:
        """Change a pod, which makes its kubelet look at the pod's volumes now, not within the minute. A kubelet that
        has not seen the new ConfigMap by then finds the old one: so one look may not do.
        """
        patch = {"metadata": {"annotations": {_ANNOTATION: mark}}}
        # A pod that is gone, or that may not be changed, is waited for all the same.
        with contextlib.suppress(ApiError):
            self.cluster.merge(_PODS, self.namespace, pod, patch, manager="rayplane")

    def behind(self, version: str) -> dict[str, str]:
        """The pods that do not work by a version yet, and why."""
        left = {}
        for pod in self.pods():
            name = pod["metadata"]["name"]
            try:
                status = self.ask("GET", "status", pod=name)
            except (AdminError, KubeError) as error:
                left[name] = f"{name}: {error}"
                continue
            if status["policy"]["version"] != version:
                said = status["policy"]["last_error"]
                left[name] = f"{name} works by {status['policy']['version']}" + (f" and says: {said}" if said else "")
        return left


def reconcile(admin: Admin, given: Json, check: bool) -> list[str]:
    """Bring revocations, weights and canaries to what is wanted; gives what was changed."""
    actions: list[str] = []
    if given["revoked"] or given["restored"]:
        refused = {key["id"]: bool(key["revoked"]) for key in admin.all_keys()}
        for names, verb in ((given["revoked"], "revoke"), (given["restored"], "restore")):
            for identity in names:
                # One that is not in the configuration is refused already.
                if refused.get(identity, verb == "revoke") != (verb == "revoke"):
                    actions.append(f"{verb} key {identity}")
                    if not check:
                        admin.tell("POST", f"keys/{quote(identity, safe='')}/{verb}")
    if given["weights"] or given["canaries"]:
        routes = admin.ask("GET", "routes")["routes"]
        for model in (*given["weights"], *given["canaries"]):
            if model not in routes:
                known = ", ".join(sorted(routes)) or "none"
                raise AdminError(f"there is no model {model}; the gateway has {known}")
        # Before anything is changed: what is wrong is told of both.
        shares = {model: share_of(model, routes[model], percent) for model, percent in given["canaries"].items()}
        for model, weights in given["weights"].items():
            now = {target["backend"]: target["weight"] for target in routes[model]["backends"]}
            declared = {target["backend"]: target["configured"] for target in routes[model]["backends"]}
            wanted = {name: int(weight) for name, weight in (weights or {}).items()}
            if unknown := sorted(set(wanted) - set(now)):
                raise AdminError(
                    f"{', '.join(unknown)}: no backend of {model}; its backends are {', '.join(sorted(now))}"
                )
            after = {**now, **wanted} if wanted else declared
            if after == now and (wanted or not routes[model]["changed"]):
                continue
            actions.append(f"weights of {model}: {_say(now)} -> {_say(after)}")
            if not check:
                path = f"routes/{quote(model, safe='')}/weights"
                admin.tell("PUT" if wanted else "DELETE", path, {"weights": wanted} if wanted else None)
        for model, share in shares.items():
            canary = routes[model].get("canary")
            if not canary:
                continue
            percent = canary["configured"] if share is None else share
            if canary["percent"] == percent and (share is not None or not canary["changed"]):
                continue
            actions.append(f"canary of {model}: {canary['percent']:g} % -> {percent:g} %")
            if not check:
                path = f"routes/{quote(model, safe='')}/canary"
                admin.tell("DELETE" if share is None else "PUT", path, None if share is None else {"percent": share})
    return actions


def share_of(model: str, route: Json, percent: Any) -> float | None:
    """A canary's percentage as it was asked for; None: the configuration's. Raises AdminError where it is none."""
    if percent is None or percent == "":
        return None
    if not route.get("canary"):
        raise AdminError(f"the route of {model} has no canary: declare one in gateway_routes.{model}.canary")
    try:
        share = float(percent)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 100:
        raise AdminError(f"the canary of {model} gets a percentage from 0 to 100, not {percent!r}")
    return share


def _say(weights: Json) -> str:
    return ", ".join(f"{name} {weight}" for name, weight in sorted(weights.items()))


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    waited = 0.0
    try:
        admin = Admin(Cluster(connection_from_environment()), given)
        if given["version"] and not module.check_mode:
            waited = admin.take_over(given["version"], given["timeout"])
        actions = reconcile(admin, given, module.check_mode)
        answers = {name: admin.all_keys() if name == "keys" else admin.ask("GET", name) for name in given["query"]}
    except (AdminError, KubeError, OSError, ValueError, KeyError) as error:
        module.fail_json(msg=str(error) if not isinstance(error, KeyError) else f"the gateway's answer has no {error}")
    module.exit_json(changed=bool(actions), actions=actions, answers=answers, waited_s=round(waited, 1))


if __name__ == "__main__":
    main()
