"""What k8s_kept_secrets makes once and finds again: certificates that sign themselves."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import Cluster
from ansible_collections.rayplane.platform.plugins.modules import k8s_kept_secrets
from ansible_collections.rayplane.platform.plugins.modules.k8s_kept_secrets import keep
from cryptography import x509
from kube_fake import Server

NAMES = ["hook.kube-system.svc", "hook.kube-system.svc.cluster.local"]
WANTED = [{"name": "hook-tls", "tls": NAMES}]
PATH = "/api/v1/namespaces/kube-system/secrets/hook-tls"


def stored(values: dict[str, str]) -> dict[str, Any]:
    data = {key: base64.b64encode(text.encode()).decode() for key, text in values.items()}
    return {"metadata": {"name": "hook-tls", "namespace": "kube-system"}, "data": data}


def test_a_certificate_is_made_once(server: Server, cluster: Cluster) -> None:
    values, made = keep(cluster, "kube-system", WANTED)
    assert made == ["hook-tls.tls.crt", "hook-tls.tls.key"]
    found = x509.load_pem_x509_certificate(values["hook-tls"]["tls.crt"].encode())
    assert found.issuer == found.subject
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == NAMES
    server.put(PATH, stored(values["hook-tls"]))
    assert keep(cluster, "kube-system", WANTED) == (values, [])


@pytest.mark.parametrize("lost", ["tls.key", "tls.crt", "names", "time"])
def test_a_certificate_is_made_anew(
    server: Server, cluster: Cluster, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _ = keep(cluster, "kube-system", WANTED)
    server.put(PATH, stored({key: text for key, text in values["hook-tls"].items() if key != lost}))
    if lost == "time":
        monkeypatch.setattr(k8s_kept_secrets, "RENEWAL_DAYS", k8s_kept_secrets.CERTIFICATE_DAYS)
    wanted = [{"name": "hook-tls", "tls": ["other.svc"]}] if lost == "names" else WANTED
    anew, made = keep(cluster, "kube-system", wanted)
    assert made and anew["hook-tls"]["tls.crt"] != values["hook-tls"]["tls.crt"]
