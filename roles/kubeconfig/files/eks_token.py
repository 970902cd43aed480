# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Print an EKS token as an ExecCredential, for machines without the AWS CLI.

The token is a presigned GetCallerIdentity request whose signed header names the cluster (aws-iam-authenticator, "API
Authorization from Outside a Cluster").
"""

import argparse
import base64
import datetime
import json
import sys

import botocore.session
from botocore.signers import RequestSigner

# EKS accepts a token for 15 minutes from its signature; one minute is left for clocks that differ.
LIFETIME = datetime.timedelta(minutes=14)
PRESIGNED_SECONDS = 60


def token(cluster: str, region: str) -> str:
    """Return the bearer token for a cluster, signed with the SDK's usual credentials."""
    session = botocore.session.get_session()
    client = session.create_client("sts", region_name=region)
    credentials = session.get_credentials()
    if credentials is None:
        sys.exit("no AWS credentials: log in, or set AWS_PROFILE")
    signer = RequestSigner(
        client.meta.service_model.service_id,
        region,
        "sts",
        "v4",
        credentials,
        session.get_component("event_emitter"),
    )
    request = {
        "method": "GET",
        "url": f"{client.meta.endpoint_url.rstrip('/')}/?Action=GetCallerIdentity&Version=2011-06-15",
        "body": {},
        "headers": {"x-k8s-aws-id": cluster},
        "context": {},
    }
    url = signer.generate_presigned_url(request, region_name=region, expires_in=PRESIGNED_SECONDS, operation_name="")
    return "k8s-aws-v1." + base64.urlsafe_b64encode(url.encode()).decode().rstrip("=")


def main() -> None:
    """Read the arguments and print the credential."""
    parser = argparse.ArgumentParser(description="Print an EKS token as an ExecCredential.")
    parser.add_argument("--cluster-name", required=True)
    parser.add_argument("--region", required=True)
    given = parser.parse_args()
    expiry = datetime.datetime.now(datetime.UTC) + LIFETIME
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "kind": "ExecCredential",
        "spec": {},
        "status": {
            "expirationTimestamp": expiry.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "token": token(given.cluster_name, given.region),
        },
    }
    print(json.dumps(credential))


if __name__ == "__main__":
    main()
