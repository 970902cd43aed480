# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What only the outside can tell: do the credentials hold, is there such a region, does the cluster answer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, REGION_TAG, tag_dict
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    ApiError,
    Cluster,
    KubeError,
    certificates_removed,
    connection_from_environment,
)
from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import folder
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.account import check_account
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.hub import no_weights
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem, nearest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import Values, entries_of

__all__ = ["check_aws", "check_cluster", "check_kubeconfig", "check_model_folders"]

# Seconds to connect and to answer. A preflight that hangs is worse than one that fails.
_PATIENCE = 10

_CREDENTIAL_CURES = {
    "ExpiredToken": "log in again (`aws sso login`, or new temporary credentials)",
    "ExpiredTokenException": "log in again (`aws sso login`, or new temporary credentials)",
    "InvalidClientTokenId": "check AWS_ACCESS_KEY_ID, or name another profile in platform_aws_profile",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY: it is not the one of the access key",
    "AccessDenied": "check the organisation's policies: the credentials may not even ask who they are",
}


def check_aws(
    environment: Mapping[str, str], profile: str, region: str, endpoint: str, values: Values | None = None
) -> Iterator[Problem]:
    """AWS takes the credentials, the region is one, and the account has what the cluster of ``values`` needs there.

    ``environment`` is what modules get beside our own.
    """
    import boto3  # noqa: PLC0415 - half a second, and only for clusters on AWS
    import botocore.exceptions as errors  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    # The SDK reads AWS_PROFILE by itself, too.
    profile = profile or os.environ.get("AWS_PROFILE", "")
    by = f"profile {profile}" if profile else "the SDK's search order (environment, shared files, instance role)"
    at = f"at {endpoint}" if endpoint else "at AWS"
    variable = "platform_aws_profile" if profile else "AWS credentials"
    found: object = profile or ABSENT
    config = Config(connect_timeout=_PATIENCE, read_timeout=_PATIENCE, retries={"total_max_attempts": 1})
    try:
        session = boto3.Session(
            profile_name=profile or None,
            region_name=region or None,
            aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID") or None,
            aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY") or None,
            aws_session_token=environment.get("AWS_SESSION_TOKEN") or None,
        )
        unknown = list(_region(session, region))
        yield from unknown
        settings: dict[str, Any] = {
            "config": config,
            "region_name": region or "us-east-1",
            "endpoint_url": endpoint or None,
        }
        client = functools.cache(lambda service: session.client(service, **settings))
        identity = client("sts").get_caller_identity()
        cluster = (values or {}).get("platform_cluster_name")
        if values and isinstance(cluster, str) and region and not unknown:
            yield from _elsewhere(client("iam"), region, cluster)
            yield from check_account(client, identity, region, values)
    except errors.ProfileNotFound:
        yield _unknown_profile(profile)
    except (errors.NoCredentialsError, errors.PartialCredentialsError) as error:
        yield Problem(
            variable,
            found,
            f"no AWS credentials by {by}: {_sentence(error)}",
            "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
        )
    except errors.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        yield Problem(
            variable,
            found,
            f"the AWS credentials by {by} are refused {at}: {_sentence(error)}",
            _CREDENTIAL_CURES.get(code, "check the credentials and the clock"),
        )
    except (
        errors.EndpointConnectionError,
        errors.ConnectTimeoutError,
        errors.ReadTimeoutError,
        errors.ConnectionClosedError,
    ) as error:
        cure = (
            "start what listens there, or correct platform_aws_endpoint_url"
            if endpoint
            else "check the network, the proxy settings and platform_region"
        )
        name = "platform_aws_endpoint_url" if endpoint else variable
        yield Problem(name, endpoint or found, f"AWS does not answer {at}: {_sentence(error)}", cure)
    except (errors.BotoCoreError, ValueError) as error:
        yield Problem(
            variable,
            found,
            f"the AWS credentials by {by} cannot be used {at}: {_sentence(error)}",
            "correct the AWS configuration or the endpoint",
        )


def _unknown_profile(profile: str) -> Problem:
    import botocore.session  # noqa: PLC0415

    known = sorted(botocore.session.Session().available_profiles)
    guess = nearest(profile, known)
    made = f"known profiles: {', '.join(known) or 'none'}; `aws configure --profile {profile}` makes one"
    cure = f"did you mean {guess}?" if guess else made
    return Problem("platform_aws_profile", profile, "no such profile in the AWS configuration", cure)


def _region(session: Any, region: str) -> Iterator[Problem]:
    known = [
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("ec2", partition_name=partition)
    ]
    if region and region not in known:
        guess = nearest(region, known)
        yield Problem(
            "platform_region",
            region,
            "AWS has no such region, as far as the installed SDK knows",
            f"did you mean {guess}?" if guess else "see the list of AWS regions",
        )


def _elsewhere(iam: Any, region: str, cluster: str) -> Iterator[Problem]:
    """Roles and buckets have one name in all regions: a second cluster of a name would share those of the first."""
    import botocore.exceptions as errors  # noqa: PLC0415

    role = f"{cluster}-control-plane"
    try:
        tags = tag_dict(iam.get_role(RoleName=role)["Role"].get("Tags"))
    except errors.ClientError:
        # There is none, or it may not be asked for: role eks tells which.
        return
    found = tags.get(REGION_TAG, region)
    if tags.get(OWNER_TAG) == cluster and found != region:
        yield Problem(
            "platform_region",
            region,
            f"the cluster {cluster} stands in {found} (tag {REGION_TAG} of the role {role})",
            f"set platform_region to {found}, or give this cluster another platform_cluster_name",
        )


def check_kubeconfig(path: str, context: str, required: bool) -> Iterator[Problem]:
    """The kubeconfig can be read and names a cluster and a user. Its absence counts only where it is ``required``."""
    files = [Path(part).expanduser() for part in path.split(os.pathsep) if part]
    present = [file for file in files if os.path.exists(file)]  # noqa: PTH110 - Path.exists fails in a folder that may not be entered
    if not present:
        if required:
            yield Problem(
                "platform_kubeconfig",
                path or ABSENT,
                "there is no such file" if path else "no kubeconfig is named",
                "point KUBECONFIG, or platform_kubeconfig in the inventory, to the cluster's kubeconfig",
            )
        return
    merged: dict[str, list[Any]] = {"contexts": [], "clusters": [], "users": []}
    current = ""
    for file in present:
        content, problem = _read_kubeconfig(file)
        if problem:
            yield problem
            return
        for kind, entries in merged.items():
            entries.extend(content.get(kind) or [])
        current = current or str(content.get("current-context") or "")
    yield from _context(path, merged, context or current, "platform_kube_context" if context else "platform_kubeconfig")


def _read_kubeconfig(file: Path) -> tuple[Mapping[str, Any], Problem | None]:
    name = "platform_kubeconfig"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no text"
        return {}, Problem(
            name,
            str(file),
            f"the kubeconfig cannot be read: {reason}",
            "give the user who runs Ansible the right to read it, or name another file",
        )
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        return {}, Problem(
            name,
            str(file),
            f"the kubeconfig is no YAML{place}",
            "write it again, for example with `aws eks update-kubeconfig`",
        )
    if not isinstance(content, Mapping) or content.get("kind") != "Config":
        return {}, Problem(
            name,
            str(file),
            "the file is no kubeconfig: it has no `kind: Config`",
            "name the file that `kubectl config view` shows",
        )
    return content, None


def _context(path: str, merged: Mapping[str, Sequence[Any]], name: str, variable: str) -> Iterator[Problem]:
    contexts = {
        str(entry.get("name")): entry.get("context") or {} for entry in merged["contexts"] if isinstance(entry, Mapping)
    }
    if not name:
        choices = ", ".join(sorted(contexts)) or "none"
        yield Problem(
            "platform_kubeconfig",
            path,
            "the kubeconfig has no current context",
            f"set platform_kube_context to one of its contexts: {choices}",
        )
        return
    if name not in contexts:
        guess = nearest(name, contexts)
        choices = f"did you mean {guess}?" if guess else f"its contexts are: {', '.join(sorted(contexts)) or 'none'}"
        yield Problem(variable, name, f"the kubeconfig {path} has no context of this name", choices)
        return
    for kind, key in (("clusters", "cluster"), ("users", "user")):
        wanted = contexts[name].get(key)
        if wanted not in {entry.get("name") for entry in merged[kind] if isinstance(entry, Mapping)}:
            yield Problem(
                "platform_kubeconfig",
                path,
                f"its context {name} names the {key} {wanted!r}, which the file does not hold",
                f"add the {key}, or choose another context",
            )


def check_cluster(path: str, context: str) -> Iterator[Problem]:
    """The API server of the kubeconfig's context answers, and knows the user; asked by the client of the modules."""
    with certificates_removed():
        yield from _check_cluster(path, context)


def _check_cluster(path: str, context: str) -> Iterator[Problem]:
    name = "platform_kubeconfig"
    try:
        connection = connection_from_environment(path, context or None)
    except KubeError as error:
        yield Problem(
            name,
            path,
            f"the Kubernetes client cannot use it: {_sentence(error)}",
            "correct the entry, or write the kubeconfig again",
        )
        return
    server = connection.server
    try:
        # Discovery needs a user that the server knows, and no right beyond that.
        Cluster(connection, timeout=_PATIENCE, retries=0).request("GET", "/api")
    except ApiError as error:
        if error.status in (401, 403):
            cure = "log in again, or name another context in platform_kube_context"
            yield Problem(name, path, f"{server} refuses the kubeconfig's user ({error.status} {error.reason})", cure)
        else:
            yield Problem(
                name,
                path,
                f"{server} answers {error.status} {error.reason}",
                "wait until the API server is ready, and look at its log",
            )
    except KubeError as error:
        reason = _sentence(error.__cause__ or error)
        if "certificate" in reason.lower() or "ssl" in reason.lower():
            yield Problem(
                name,
                path,
                f"the certificate of {server} does not fit the kubeconfig: {reason}",
                "the kubeconfig is another cluster's, or old: write it again",
            )
        else:
            yield Problem(
                name,
                path,
                f"no API server answers at {server}: {reason}",
                "start the cluster, connect to its network, or name another context in platform_kube_context",
            )


def check_model_folders(values: Values) -> Iterator[Problem]:
    """A model that comes from a folder: the folder is there and holds a model."""
    for path, entry in entries_of(values, "rayservice_models"):
        place, where = folder(entry.get("source")), f"{path}.source"
        if place is None:
            continue
        if not place.is_dir():
            yield Problem(
                where,
                entry["source"],
                "there is no such folder on the machine that runs Ansible",
                "correct the path, or name a hub id (organisation/model)",
            )
        elif not (place / "config.json").is_file():
            yield Problem(
                where,
                entry["source"],
                "the folder holds no config.json, so no model vLLM can read",
                "name the folder with the model's config.json, tokenizer and weights",
            )
        else:
            names = [file.name for file in place.iterdir()]
            yield from no_weights(where, entry, names, values.get("models_ignore"))


def _sentence(error: BaseException) -> str:
    """An exception's text on one line, without the object addresses that some libraries put in."""
    text = " ".join(str(error).split())
    text = text.rsplit(">: ", maxsplit=1)[-1] if ">: " in text else text
    return (text or type(error).__name__).rstrip(".")
