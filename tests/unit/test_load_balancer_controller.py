"""The role load_balancer_controller against an API server in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import PROJECT
from kube_fake import Server

#: Prints objects as the chart does: what the API server calls bears the certificate that stands in the values.
HELM = """#!/bin/sh
values=$(sha256sum | cut -c1-64)
cat <<END
{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "aws-load-balancer-tls"}, "data": {"tls.key": "random"}}
---
{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "aws-load-balancer-controller"}, "spec":
 {"selector": {}, "template": {"spec": {}}, "values": "$values"}}
END
"""
BINDING = "/apis/elbv2.k8s.aws/v1beta1/namespaces/rayplane/targetgroupbindings/k8s-gateway"
CONTROLLER = "/apis/apps/v1/namespaces/kube-system/deployments/aws-load-balancer-controller"
SECRET = "/api/v1/namespaces/kube-system/secrets/aws-load-balancer-tls"


def deploy(server: Server, folder: Path, enabled: bool) -> subprocess.CompletedProcess[str]:
    """Run the role once."""
    (folder / "helm").write_text(HELM)
    (folder / "helm").chmod(0o755)
    (folder / "chart").mkdir(exist_ok=True)
    (folder / "chart" / "Chart.yaml").write_text("name: x")
    where = {"K8S_AUTH_HOST": f"http://127.0.0.1:{server.server_address[1]}", "K8S_AUTH_API_KEY": "key"}
    play = {"hosts": "all", "gather_facts": False, "environment": where, "roles": ["load_balancer_controller"]}
    (folder / "play.yml").write_text(json.dumps([play]))
    values: dict[str, Any] = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "platform": "aws",
        "platform_cluster_name": "c1",
        "platform_region": "eu-central-1",
        "platform_tags": {},
        "eks_load_balancer_controller": enabled,
        "load_balancer_controller_chart": str(folder / "chart"),
        "load_balancer_controller_repo_url": "",
        "load_balancer_controller_helm": str(folder / "helm"),
        "load_balancer_controller_cache_dir": str(folder / "cache"),
        "load_balancer_controller_wait": False,
    }
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "play.yml", "-e", json.dumps(values)],
        cwd=folder,
        env=os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(PROJECT / "roles")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_it_is_kept_and_goes_when_nothing_needs_it(server: Server, tmp_path: Path) -> None:
    server.kinds["elbv2.k8s.aws/v1beta1"] = {"TargetGroupBinding": ("targetgroupbindings", True)}
    server.put("/api/v1/namespaces/kube-system", {"metadata": {"name": "kube-system"}})
    first = deploy(server, tmp_path, enabled=True)
    assert "changed=2" in first.stdout, first.stdout
    assert set(server.objects[SECRET]["data"]) == {"tls.crt", "tls.key"}
    kept = dict(server.objects)
    again = deploy(server, tmp_path, enabled=True)
    assert "changed=0" in again.stdout, again.stdout
    assert server.objects == kept
    server.put(BINDING, {"metadata": {"name": "k8s-gateway", "namespace": "rayplane"}})
    refused = deploy(server, tmp_path, enabled=False)
    assert "TargetGroupBinding rayplane/k8s-gateway could not go any more" in refused.stdout
    assert SECRET in server.objects
    del server.objects[BINDING]
    assert "changed=1" in deploy(server, tmp_path, enabled=False).stdout
    assert list(server.objects) == ["/api/v1/namespaces/kube-system"]


def test_a_controller_of_somebody_elses_is_left_alone(server: Server, tmp_path: Path) -> None:
    for path, name in ((CONTROLLER, "aws-load-balancer-controller"), (SECRET, "aws-load-balancer-tls")):
        meta = {"name": name, "namespace": "kube-system", "annotations": {"meta.helm.sh/release-name": "alb"}}
        server.put(path, {"metadata": meta})
    refused = deploy(server, tmp_path, enabled=True)
    assert "(Helm release alb)" in refused.stdout, refused.stdout
    assert "Set load_balancer_controller_enabled to false to leave it alone" in refused.stdout
    assert server.writes == []
