"""Try failed applications of Ray Serve again: neither Serve nor the operator tries the same configuration twice."""

from __future__ import annotations

import time

from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import ApiError, Cluster, Json
from ansible_collections.rayplane.platform.plugins.module_utils.kube.state import (
    DEPLOY_FAILED,
    any_answers,
    ask_serve,
    failed_deployments,
    has_taken,
    serve_config,
    tell_serve,
)

_GONE_WITHIN_S = 60.0


def retry_failed(cluster: Cluster, rayservice: Json, dry_run: bool = False) -> dict[str, str]:
    """Have Serve try again the declared applications that failed, or that it lost. Returns their names and statuses.

    Given the same configuration, Serve builds an application again that failed to build. Replicas that failed to start
    it starts again only where the application was taken away in between, so one with a replica that answers is left
    alone. Who may not tell Serve changes nothing. Raises ApiError where Serve does not take what it is told.
    """
    status, config = rayservice.get("status", {}), serve_config(rayservice)
    declared = {app["name"]: app for app in config["applications"]}
    retried: dict[str, str] = {}
    for which in ("pending", "active"):
        said = status.get(f"{which}ServiceStatus") or {}
        reported, ray_cluster = said.get("applicationStatuses") or {}, said.get("rayClusterName")
        # The operator looks every few seconds; where it saw them all run, nobody has to be asked.
        if not ray_cluster or all((reported.get(name) or {}).get("status") == "RUNNING" for name in declared):
            continue
        try:
            deployed = ask_serve(cluster, rayservice, ray_cluster)
        except ApiError:
            continue
        failed = {
            name: failed_deployments(app)
            for name, app in deployed.items()
            if app.get("status") == DEPLOY_FAILED
            and name in declared
            and has_taken(app, declared[name])
            and not any_answers(failed_deployments(app))
        }
        again = dict.fromkeys(failed, DEPLOY_FAILED)
        if which == "active":
            again |= {name: "absent" for name in declared if name not in deployed}
        if again and not dry_run:
            without = {name for name, deployments in failed.items() if deployments}
            try:
                if without:
                    left = [app for app in config["applications"] if app["name"] not in without]
                    tell_serve(cluster, rayservice, ray_cluster, {**config, "applications": left})
                    # A deployment that comes back before it is gone keeps its failure.
                    end = time.monotonic() + _GONE_WITHIN_S
                    while without & ask_serve(cluster, rayservice, ray_cluster).keys() and time.monotonic() < end:
                        time.sleep(0.3)
                tell_serve(cluster, rayservice, ray_cluster, config)
            except ApiError as error:
                if error.status != 403:
                    raise
                continue
        retried |= again
    return retried
