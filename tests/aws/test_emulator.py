"""The emulator's patches: their answers have the form of AWS's service models, and they refuse what AWS refuses."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

import pytest
from botocore.exceptions import ClientError

from .account import Account
from .answers import Recorder
from .conftest import ENTRIES, Playbook

TRUST = '{"Version": "2012-10-17", "Statement": []}'
TAGS = {"team": "ml"}


def ec2_calls(ec2: Any) -> None:
    """Call every operation of EC2 that is patched."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    other = ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="one", Description="one", VpcId=vpc)["GroupId"]
    rule = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}
    for direction in ("ingress", "egress"):
        getattr(ec2, f"authorize_security_group_{direction}")(GroupId=group, IpPermissions=[rule])
        getattr(ec2, f"revoke_security_group_{direction}")(GroupId=group, IpPermissions=[rule])
    ec2.describe_security_groups(GroupIds=[group])
    ec2.describe_security_group_rules()
    ec2.describe_instance_type_offerings(LocationType="availability-zone-id")
    ec2.create_flow_logs(
        ResourceIds=[vpc],
        ResourceType="VPC",
        TrafficType="ALL",
        LogDestinationType="s3",
        LogDestination="arn:aws:s3:::logs",
        TagSpecifications=[{"ResourceType": "vpc-flow-log", "Tags": [{"Key": "Name", "Value": "one"}]}],
    )
    ec2.describe_flow_logs()
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    nat = ec2.create_nat_gateway(SubnetId=subnet, AllocationId=address)["NatGateway"]["NatGatewayId"]
    ec2.describe_nat_gateways()
    ec2.describe_addresses()
    endpoint = ec2.create_vpc_endpoint(
        VpcEndpointType="Interface",
        VpcId=vpc,
        ServiceName="com.amazonaws.us-west-2.sts",
        SubnetIds=[subnet],
        SecurityGroupIds=[group],
        PrivateDnsEnabled=True,
    )["VpcEndpoint"]["VpcEndpointId"]
    ec2.create_vpc_endpoint(VpcId=vpc, ServiceName="com.amazonaws.us-west-2.s3")
    ec2.modify_vpc_endpoint(VpcEndpointId=endpoint, RemoveSecurityGroupIds=[group], PrivateDnsEnabled=False)
    ec2.describe_vpc_endpoints()
    peering = ec2.create_vpc_peering_connection(VpcId=vpc, PeerVpcId=other)["VpcPeeringConnection"]
    peering = peering["VpcPeeringConnectionId"]
    ec2.accept_vpc_peering_connection(VpcPeeringConnectionId=peering)
    options = {"AllowDnsResolutionFromRemoteVpc": True}
    ec2.modify_vpc_peering_connection_options(VpcPeeringConnectionId=peering, RequesterPeeringConnectionOptions=options)
    ec2.create_tags(Resources=[peering], Tags=[{"Key": "Name", "Value": "one"}])
    ec2.describe_vpc_peering_connections()
    ec2.describe_tags()
    table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="10.1.0.0/16", NatGatewayId=nat)
    ec2.replace_route(RouteTableId=table, DestinationCidrBlock="10.1.0.0/16", VpcPeeringConnectionId=peering)
    ec2.delete_nat_gateway(NatGatewayId=nat)
    ec2.describe_route_tables()
    ec2.describe_nat_gateways()
    instance = ec2.run_instances(ImageId="ami-1", MinCount=1, MaxCount=1, SubnetId=subnet)["Instances"][0]["InstanceId"]
    ec2.modify_instance_attribute(InstanceId=instance, Groups=[group])
    ec2.describe_instances()
    ec2.terminate_instances(InstanceIds=[instance])


TEMPLATE = {
    "InstanceType": "g5.xlarge",
    "Placement": {"GroupName": "close"},
    "InstanceMarketOptions": {"MarketType": "capacity-block"},
    "CapacityReservationSpecification": {"CapacityReservationTarget": {"CapacityReservationId": "cr-1"}},
    "BlockDeviceMappings": [
        {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 100, "Encrypted": True, "KmsKeyId": "arn:key"}}
    ],
    "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
    "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "one"}]}],
}


def template_calls(ec2: Any) -> str:
    """Call the operations of launch templates; returns one's id."""
    tags = [{"ResourceType": "launch-template", "Tags": [{"Key": "Name", "Value": "one"}]}]
    made = ec2.create_launch_template(LaunchTemplateName="one", LaunchTemplateData=TEMPLATE, TagSpecifications=tags)
    template = str(made["LaunchTemplate"]["LaunchTemplateId"])
    data = {"CapacityReservationSpecification": {"CapacityReservationPreference": "none"}}
    ec2.create_launch_template_version(LaunchTemplateId=template, LaunchTemplateData=data)
    ec2.describe_launch_template_versions(LaunchTemplateId=template)
    ec2.describe_launch_templates()
    return template


def eks_calls(eks: Any, role: str, subnets: list[str], template: str) -> None:
    """Call every operation of EKS that is patched, and those that show what the patches keep."""
    eks.create_cluster(
        name="one",
        version="1.34",
        roleArn=role,
        resourcesVpcConfig={"subnetIds": subnets},
        logging={"clusterLogging": [{"types": ["api"], "enabled": True}]},
        accessConfig={"authenticationMode": "API", "bootstrapClusterCreatorAdminPermissions": True},
        upgradePolicy={"supportType": "STANDARD"},
        zonalShiftConfig={"enabled": True},
        deletionProtection=True,
        tags=TAGS,
    )
    key = [{"resources": ["secrets"], "provider": {"keyArn": "arn:aws:kms:us-west-2:1:key/1"}}]
    updates = [
        eks.associate_encryption_config(clusterName="one", encryptionConfig=key),
        eks.update_cluster_config(name="one", resourcesVpcConfig={"endpointPrivateAccess": True}),
        eks.update_cluster_config(name="one", logging={"clusterLogging": [{"types": ["audit"], "enabled": True}]}),
        eks.update_cluster_config(name="one", accessConfig={"authenticationMode": "API"}),
        eks.update_cluster_config(name="one", deletionProtection=False),
        eks.update_cluster_version(name="one", version="1.35"),
    ]
    group = {
        "clusterName": "one",
        "subnets": subnets,
        "nodeRole": role,
        "scalingConfig": {"minSize": 0, "maxSize": 2, "desiredSize": 1},
    }
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NO_SCHEDULE"}
    eks.create_nodegroup(
        **group,
        nodegroupName="plain",
        instanceTypes=["m5.large"],
        amiType="AL2023_x86_64_STANDARD",
        diskSize=50,
        labels={"pool": "cpu"},
        taints=[taint],
        nodeRepairConfig={"enabled": True},
        tags=TAGS,
    )
    eks.create_nodegroup(
        **group, nodegroupName="block", capacityType="CAPACITY_BLOCK", launchTemplate={"id": template, "version": "1"}
    )
    plain = {"clusterName": "one", "nodegroupName": "plain"}
    updates += [
        eks.update_nodegroup_config(**plain, scalingConfig={"maxSize": 3}, taints={"removeTaints": [taint]}),
        eks.update_nodegroup_version(**plain),
    ]
    for name in eks.list_nodegroups(clusterName="one")["nodegroups"]:
        eks.describe_nodegroup(clusterName="one", nodegroupName=name)
    identity = {"serviceAccount": "ebs-csi-controller-sa", "roleArn": role}
    addon = {"clusterName": "one", "addonName": "aws-ebs-csi-driver"}
    eks.create_addon(**addon, podIdentityAssociations=[identity], tags=TAGS)
    arn = eks.describe_addon(**addon)["addon"]["podIdentityAssociations"][0]
    for one in eks.list_pod_identity_associations(clusterName="one")["associations"]:
        eks.describe_pod_identity_association(clusterName="one", associationId=one["associationId"])
    eks.tag_resource(resourceArn=arn, tags=TAGS)
    eks.update_addon(**addon, podIdentityAssociations=[])
    eks.describe_addon_versions(addonName="aws-ebs-csi-driver", kubernetesVersion="1.35")
    eks.list_addons(clusterName="one")
    cluster = eks.describe_cluster(name="one")["cluster"]["arn"]
    eks.tag_resource(resourceArn=cluster, tags=TAGS)
    eks.untag_resource(resourceArn=cluster, tagKeys=["team"])
    for one in eks.list_access_entries(clusterName="one")["accessEntries"]:
        eks.describe_access_entry(clusterName="one", principalArn=one)
    policy = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
    entry = {"clusterName": "one", "principalArn": "arn:aws:iam::111122223333:role/operators"}
    eks.create_access_entry(**entry, tags=TAGS)
    eks.associate_access_policy(**entry, policyArn=policy, accessScope={"type": "cluster"})
    eks.list_associated_access_policies(**entry)
    for update in updates:
        eks.describe_update(name="one", updateId=update["update"]["id"])
    eks.list_clusters()
    eks.delete_addon(**addon)
    for name in ("plain", "block"):
        eks.delete_nodegroup(clusterName="one", nodegroupName=name)
    eks.delete_cluster(name="one")


def control(account: Account, path: str, settings: dict[str, Any] | None = None) -> Any:
    """Ask the emulator about itself, or give it settings."""
    data = None if settings is None else json.dumps(settings).encode()
    request = urllib.request.Request(
        f"{account.endpoint}/_rayplane/{path}", data, method="GET" if data is None else "PUT"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return json.load(answer)


def configure(account: Account, **settings: Any) -> None:
    """Set what depends on the account."""
    control(account, f"settings/{account.number}", settings)


def role(account: Account) -> str:
    """Return the ARN of a role."""
    iam = account.client("iam")
    return str(iam.create_role(RoleName="one", AssumeRolePolicyDocument=TRUST)["Role"]["Arn"])


def subnets(account: Account) -> list[str]:
    """Return the subnets of the default VPC."""
    return [one["SubnetId"] for one in account.ec2.describe_subnets()["Subnets"]]


def test_answers_have_the_form_of_the_service_models(account: Account) -> None:
    seen = {service: Recorder(account.client(service)) for service in ("ec2", "eks", "service-quotas", "ssm", "logs")}
    ec2_calls(account.ec2)
    eks_calls(account.client("eks"), role(account), subnets(account)[:2], template_calls(account.ec2))
    quotas = account.client("service-quotas")
    listed = quotas.list_service_quotas(ServiceCode="ec2")["Quotas"]
    assert quotas.get_service_quota(ServiceCode="ec2", QuotaCode=listed[0]["QuotaCode"])["Quota"] == listed[0]
    account.client("logs").create_log_group(logGroupName="one")
    account.client("logs").delete_log_group(logGroupName="one")
    release = "/aws/service/eks/optimized-ami/1.36/amazon-linux-2023/arm64/nvidia/recommended/release_version"
    assert account.client("ssm").get_parameters(Names=[release])["Parameters"][0]["Value"] == "1.36.0-20261101"
    for service, operations in control(account, "operations").items():
        missing = set(operations) - seen[service].operations
        assert not missing, f"patched, and not called here: {missing}"
    faults = [fault for one in seen.values() for fault in one.faults]
    # What MiniStack itself adds there reads nobody.
    faults = [fault for fault in faults if not fault.startswith("CreateVpc.vpc.")]
    assert not faults, "\n".join(dict.fromkeys(faults))


def security_group(ec2: Any) -> str:
    return str(ec2.create_security_group(GroupName="one", Description="one")["GroupId"])


def rule(cidr: str = "10.0.0.0/8", low: int = 443, high: int = 443) -> dict[str, Any]:
    return {"IpProtocol": "tcp", "FromPort": low, "ToPort": high, "IpRanges": [{"CidrIp": cidr}]}


def twice(account: Account, *permissions: dict[str, Any]) -> None:
    group = security_group(account.ec2)
    for one in permissions:
        account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[one])


def test_each_network_of_a_rule_is_revoked_alone(account: Account) -> None:
    group = security_group(account.ec2)
    both = {**rule(), "IpRanges": [{"CidrIp": "10.0.0.0/8", "Description": "one"}, {"CidrIp": "172.16.0.0/12"}]}
    account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[both])
    account.ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[rule()])
    (left,) = account.ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    assert [one["CidrIp"] for one in left["IpRanges"]] == ["172.16.0.0/12"]


REFUSED: dict[str, tuple[str, Callable[[Account], Any]]] = {
    "a role's name of 65": (
        "ValidationError",
        lambda a: a.client("iam").create_role(RoleName="r" * 65, AssumeRolePolicyDocument=TRUST),
    ),
    "an instance profile's name": (
        "ValidationError",
        lambda a: a.client("iam").create_instance_profile(InstanceProfileName="a name"),
    ),
    "a cluster's name": (
        "InvalidParameterException",
        lambda a: a.client("eks").create_cluster(name="c" * 101, roleArn="r", resourcesVpcConfig={}),
    ),
    "a label's value": (
        "InvalidParameterException",
        lambda a: a.client("eks").create_nodegroup(
            clusterName="one", nodegroupName="g", subnets=[], nodeRole="r", labels={"pool": "v" * 64}
        ),
    ),
    "a bucket's ending": ("InvalidBucketName", lambda a: a.client("s3").create_bucket(Bucket="models-s3alias")),
    "a bucket's beginning": ("InvalidBucketName", lambda a: a.client("s3").create_bucket(Bucket="xn--models")),
    "a rule again": ("InvalidPermission.Duplicate", lambda a: twice(a, rule(), rule("10.1.2.3/8"))),
    "a rule twice": (
        "InvalidParameterValue",
        lambda a: a.ec2.authorize_security_group_ingress(GroupId=security_group(a.ec2), IpPermissions=[rule(), rule()]),
    ),
    "ports the wrong way round": ("InvalidParameterValue", lambda a: twice(a, rule(low=444))),
    "no network": ("InvalidParameterValue", lambda a: twice(a, rule("10.0.0.0/33"))),
    "a rule that is not there": (
        "InvalidPermission.NotFound",
        lambda a: a.ec2.revoke_security_group_ingress(GroupId=security_group(a.ec2), IpPermissions=[rule()]),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_aws_refuses_is_refused(account: Account, what: str) -> None:
    code, call = REFUSED[what]
    with pytest.raises(ClientError) as refused:
        call(account)
    assert refused.value.response["Error"]["Code"] == code


def test_the_rule_that_a_new_group_has_is_revoked_however_it_is_written(account: Account) -> None:
    group = security_group(account.ec2)
    everything = {"IpProtocol": "-1", "FromPort": 0, "ToPort": 0, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    for call in ("revoke_security_group_egress", "authorize_security_group_egress"):
        getattr(account.ec2, call)(GroupId=group, IpPermissions=[everything])
    (kept,) = account.ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissionsEgress"]
    assert "FromPort" not in kept


def test_a_taken_name_is_there_and_forbidden(account: Account) -> None:
    configure(account, taken_buckets=["ray-llm-models"])
    s3 = account.client("s3")
    where = {"LocationConstraint": account.region}
    for call, code in (
        (lambda: s3.head_bucket(Bucket="ray-llm-models"), "403"),
        (lambda: s3.get_bucket_tagging(Bucket="ray-llm-models"), "AccessDenied"),
        (lambda: s3.create_bucket(Bucket="ray-llm-models", CreateBucketConfiguration=where), "BucketAlreadyExists"),
    ):
        with pytest.raises(ClientError) as refused:
            call()
        assert refused.value.response["Error"]["Code"] == code


def test_a_creation_with_the_same_token_happens_once(account: Account) -> None:
    data = {"LaunchTemplateName": "one", "LaunchTemplateData": TEMPLATE, "ClientToken": "t"}
    first, second = (account.ec2.create_launch_template(**data)["LaunchTemplate"] for _ in range(2))
    assert first["LaunchTemplateId"] == second["LaunchTemplateId"]


def cluster(account: Account, **access: Any) -> Any:
    network = {"subnetIds": subnets(account)[:2], **access}
    return account.client("eks").create_cluster(name="one", roleArn=role(account), resourcesVpcConfig=network)[
        "cluster"
    ]


def test_a_node_group_fails_where_the_quota_does_not_suffice(account: Account) -> None:
    configure(account, quotas={"L-DB2E81BA": 8})
    eks, arn = account.client("eks"), cluster(account)["roleArn"]
    group = {"clusterName": "one", "subnets": subnets(account)[:2], "nodeRole": arn, "instanceTypes": ["g4dn.xlarge"]}

    def made(name: str, size: int, **more: Any) -> Any:
        scaling = {"minSize": 0, "maxSize": 9, "desiredSize": size}
        eks.create_nodegroup(**{**group, **more}, nodegroupName=name, scalingConfig=scaling)
        return eks.describe_nodegroup(clusterName="one", nodegroupName=name)["nodegroup"]

    assert made("fits", 2)["status"] == "ACTIVE"
    failed = made("more", 1)
    assert failed["status"] == "CREATE_FAILED"
    (issue,) = failed["health"]["issues"]
    assert issue["code"] == "AsgInstanceLaunchFailures"
    assert "vCPU limit of 8 " in issue["message"]
    assert issue["resourceIds"] == [failed["resources"]["autoScalingGroups"][0]["name"]]
    assert made("spot", 1, capacityType="SPOT")["status"] == "ACTIVE"
    eks.update_nodegroup_config(clusterName="one", nodegroupName="fits", scalingConfig={"desiredSize": 3})
    assert eks.describe_nodegroup(clusterName="one", nodegroupName="fits")["nodegroup"]["status"] == "DEGRADED"


def test_the_log_group_of_a_deleted_cluster_is_written_once_more(account: Account) -> None:
    logging = {"clusterLogging": [{"types": ["api"], "enabled": True}]}
    cluster(account)
    account.client("eks").update_cluster_config(name="one", logging=logging)
    logs, name = account.client("logs"), "/aws/eks/one/cluster"
    logs.create_log_group(logGroupName=name)
    account.client("eks").delete_cluster(name="one")
    for left in (1, 0):
        logs.delete_log_group(logGroupName=name)
        assert len(logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"]) == left


def test_a_deployment_above_the_quota_says_so(account: Account, playbook: Playbook) -> None:
    configure(account, quotas={"L-DB2E81BA": 0, "L-3819A6DF": 0})
    run = playbook(
        *("playbooks/deploy.yml", "-i", "inventories/dev", "--tags", "encryption,network,storage,eks"),
        variables={**account.environment, "eks_access_entries": ENTRIES},
    )
    assert run.returncode
    assert re.search("L-(DB2E81BA|3819A6DF)", run.text), run.text[-3000:]


def test_a_cluster_is_refused_in_a_zone_without_eks(account: Account) -> None:
    zone = account.ec2.describe_subnets(SubnetIds=subnets(account)[1:2])["Subnets"][0]
    configure(account, unsupported_zones=[zone["AvailabilityZoneId"]])
    with pytest.raises(ClientError) as refused:
        cluster(account)
    assert refused.value.response["Error"]["Code"] == "UnsupportedAvailabilityZoneException"
    assert zone["AvailabilityZone"] not in refused.value.response["validZones"]


@pytest.mark.parametrize(
    ("access", "answers"),
    [
        ({"publicAccessCidrs": ["203.0.113.0/24"]}, True),
        ({"publicAccessCidrs": ["198.51.100.0/24"]}, False),
        ({"endpointPublicAccess": False, "endpointPrivateAccess": True}, False),
    ],
)
def test_the_api_server_answers_whom_the_endpoint_admits(account: Account, access: Any, answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"https://127.0.0.1:{server.getsockname()[1]}"
        configure(account, caller="203.0.113.7", api_server={"endpoint": address})
        made = cluster(account, **access)
        described = account.client("eks").describe_cluster(name="one")["cluster"]
        assert made["endpoint"] == described["endpoint"]
        where = urlparse(described["endpoint"])
        try:
            socket.create_connection((where.hostname, where.port), timeout=2).close()
        except TimeoutError:
            assert not answers
        else:
            assert answers


def test_settings_that_the_emulator_does_not_know_are_refused(account: Account) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        configure(account, quota={})
    assert "quota: the settings are quotas (dict)" in refused.value.read().decode()
