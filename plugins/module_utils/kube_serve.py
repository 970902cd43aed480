"""Try failed applications of Ray Serve again: neither Serve nor the operator tries the same configuration twice."""

from __future__ import annotations

import time

from ansible.module_utils.kube_api import ApiError, Cluster, Json
from ansible.module_utils.kube_state import (
    DEPLOY_FAILED,
    any_answers,
    ask_serve,
    failed_deployments,
    has_taken,
    serve_config,
)

_GONE_WITHIN_S = 60.0


def retry_failed(cluster: Cluster, rayservice: Json, dry_run: bool = False) -> list[str]:
    """Have Serve try again the declared applications that failed, or that it lost. Returns their names.

    Given the same configuration, Serve builds an application again that failed to build. Replicas that failed to start
    it starts again only where the application was taken away in between, so one with a replica that answers is left
    alone. Who may not ask Serve changes nothing.
    """
    status, config = rayservice.get("status", {}), serve_config(rayservice)
    declared = {app["name"]: app for app in config["applications"]}
    retried: list[str] = []
    for which in ("pending", "active"):
        ray_cluster = (status.get(f"{which}ServiceStatus") or {}).get("rayClusterName")
        if not ray_cluster:
            continue
        try:
            deployed = ask_serve(cluster, rayservice, ray_cluster)
            again = {
                name: failed_deployments(app)
                for name, app in deployed.items()
                if app.get("status") == DEPLOY_FAILED
                and name in declared
                and has_taken(app, declared[name])
                and not any_answers(failed_deployments(app))
            }
            if which == "active":
                again |= {name: [] for name in declared if name not in deployed}
            if again and not dry_run:
                if failed := {name for name, deployments in again.items() if deployments}:
                    left = [app for app in config["applications"] if app["name"] not in failed]
                    ask_serve(cluster, rayservice, ray_cluster, {**config, "applications": left})
                    # A deployment that comes back before it is gone keeps its failure.
                    end = time.monotonic() + _GONE_WITHIN_S
                    while failed & ask_serve(cluster, rayservice, ray_cluster).keys() and time.monotonic() < end:
                        time.sleep(0.3)
                ask_serve(cluster, rayservice, ray_cluster, config)
        except ApiError:
            continue
        retried += again
    return retried
