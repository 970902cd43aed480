#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Find the values of Secrets that were made once, or make them."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: k8s_kept_secrets
short_description: Find the values of Secrets that were made once, or make them
description:
  - >-
    Some secrets nobody has to know beforehand (a database's password, a signing key). This module reads them from the
    cluster, and makes at random what is not there yet. It writes nothing: M(rayplane.platform.k8s_apply_set) applies
    the Secrets with the values, so that they are kept at every further run.
  - What it returns is secret. Give its tasks C(no_log).
options:
  namespace:
    description: Namespace of the Secrets.
    type: str
    required: true
  secrets:
    description:
      - The Secrets, each with C(name) and C(values), a mapping from key to what it holds.
      - One that is C(given) is made by somebody else; what it lacks is a failure.
      - V(token) is 256 random bits as text, V(api_key) a key of the gateway, V(ed25519) a private key as PEM (PKCS#8).
      - With C(tls), a list of DNS names, in place of C(values), it holds C(tls.crt) and C(tls.key), a certificate for
        these names that signs itself. It is made anew 90 days before its end, and where the names are others.
    type: list
    elements: dict
    required: true
  values_returned:
    description: >-
      False only sees that what is given is there and has the right shape. Nothing secret is returned then, so that a
      failure can be read.
    type: bool
    default: true
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Reads, and makes what is missing for the prediction only.
"""

EXAMPLES = r"""
- name: Find or make what is secret
  rayplane.platform.k8s_kept_secrets:
    namespace: rayplane
    secrets:
      - {name: gateway-redis, values: {password: token}}
  no_log: true
  register: __gateway_secrets
"""

RETURN = r"""
values:
  description: By name of the Secret, and by key, the value.
  type: dict
  returned: unless O(values_returned) is false
made:
  description: The Secrets of which something was missing, as C(NAME.KEY).
  type: list
  returned: always
"""

import base64
import datetime
import re
import secrets
import string
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    Cluster,
    KubeError,
    NoKubeconfigError,
    Resource,
    connection_from_environment,
)

_PREFIX_LENGTH = 12


def api_key() -> str:
    """A key as `serve_app.gateway.keys` makes it: 12 public characters, 256 random bits."""
    alphabet = string.ascii_lowercase + string.digits
    prefix = secrets.choice(string.ascii_lowercase)
    prefix += "".join(secrets.choice(alphabet) for _ in range(_PREFIX_LENGTH - 1))
    return f"rp-{prefix}-{secrets.token_urlsafe(32)}"


def ed25519() -> str:
    """A fresh Ed25519 private key, PEM."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - only where a key is made
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    return (
        Ed25519PrivateKey.generate()
        .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        .decode()
    )


#: Days that a certificate lasts, and days before its end from which it is made anew.
CERTIFICATE_DAYS = 3650
RENEWAL_DAYS = 90


def certificate(names: list[str]) -> dict[str, str]:
    """A certificate for ``names`` that signs itself, and its key (P-256), both PEM."""
    from cryptography import x509  # noqa: PLC0415 - only where a certificate is made
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rayplane")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks differ.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"tls.crt": signed.public_bytes(serialization.Encoding.PEM).decode(), "tls.key": private.decode()}


def still_good(pair: dict[str, str], names: list[str]) -> bool:
    """Whether a certificate with its key is there, is for ``names``, and does not end soon."""
    from cryptography import x509  # noqa: PLC0415 - only where a certificate is kept

    try:
        found = x509.load_pem_x509_certificate(pair["tls.crt"].encode())
        held = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (KeyError, ValueError, x509.ExtensionNotFound):
        return False
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=RENEWAL_DAYS)
    same = sorted(held.get_values_for_type(x509.DNSName)) == sorted(names)
    return same and found.not_valid_after_utc > soon and bool(pair.get("tls.key"))


MAKERS: dict[str, Callable[[], str]] = {
    "token": lambda: secrets.token_urlsafe(32),
    "api_key": api_key,
    "ed25519": ed25519,
}


#: What a value that somebody else made has to look like, where it could be something else.
SHAPES = {
    "api_key": (
        re.compile(r"rp-[A-Za-z0-9]{12}-[A-Za-z0-9_-]{43}"),
        "a key of the gateway (rp-..., playbooks/keys.yml)",
    ),
    "ed25519": (re.compile(r"\s*-----BEGIN PRIVATE KEY-----.*", re.DOTALL), "a private key as PEM (PKCS#8)"),
}


class SecretError(Exception):
    """A Secret that somebody else makes is not there, or holds something else."""


def keep(
    cluster: Cluster | None, namespace: str, wanted: list[dict[str, Any]], predict: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The values by Secret and key, and what was made because it was not there.

    ``predict``: what is given and not there yet is made, too, so that the rest can be predicted. Raises SecretError.
    """
    resource = Resource("v1", "Secret", "secrets", True)
    values: dict[str, Any] = {}
    made: list[str] = []
    for secret in wanted:
        name = secret["name"]
        live = (cluster.get(resource, namespace, name) if cluster else None) or {}
        data = live.get("data") or {}
        values.setdefault(name, {})
        if names := secret.get("tls"):
            pair = {key: base64.b64decode(data[key]).decode() for key in ("tls.crt", "tls.key") if data.get(key)}
            if not still_good(pair, names):
                pair = certificate(names)
                made += [f"{name}.{key}" for key in pair]
            values[name] |= pair
        for key, kind in (secret.get("values") or {}).items():
            if data.get(key):
                found = base64.b64decode(data[key]).decode()
                if secret.get("given"):
                    found = found.strip() if kind != "ed25519" else found
                    shape, what = SHAPES.get(kind, (None, ""))
                    if shape is not None and not shape.fullmatch(found):
                        raise SecretError(f"{key} of the Secret {namespace}/{name} is not {what}")
                values[name][key] = found
            elif secret.get("given") and not predict:
                raise SecretError(
                    f"there is no Secret {namespace}/{name} with the key {key}, and it is to be made by somebody else:"
                    " make it (see that External Secrets has done so), or take its name out"
                )
            else:
                values[name][key] = MAKERS[kind]()
                made.append(f"{name}.{key}")
    return values, made


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    for secret in given["secrets"]:
        for key, kind in (secret.get("values") or {}).items():
            if kind not in MAKERS:
                module.fail_json(msg=f"{secret.get('name')}.{key}: {kind!r} is none of {', '.join(MAKERS)}")
    try:
        cluster: Cluster | None = None
        try:
            cluster = Cluster(connection_from_environment())
        except NoKubeconfigError:
            if not module.check_mode:
                raise
        values, made = keep(cluster, given["namespace"], given["secrets"], predict=module.check_mode)
    except (SecretError, KubeError, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    # What was made is no change yet: applying it is.
    module.exit_json(changed=False, made=made, **({"values": values} if given["values_returned"] else {}))


if __name__ == "__main__":
    main()
