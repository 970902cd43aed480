"""The emulator's own patches: their answers have the form that AWS's service models give, and they refuse what AWS refuses."""

from __future__ import annotations

from typing import Any

import pytest

from .account import Account
from .answers import Recorder

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


def test_answers_have_the_form_of_the_service_models(account: Account) -> None:
    seen = {service: Recorder(account.client(service)) for service in ("ec2", "eks")}
    ec2_calls(account.ec2)
    template = template_calls(account.ec2)
    role = account.client("iam").create_role(RoleName="one", AssumeRolePolicyDocument=TRUST)["Role"]["Arn"]
    subnets = [one["SubnetId"] for one in account.ec2.describe_subnets()["Subnets"]][:2]
    eks_calls(account.client("eks"), role, subnets, template)
    faults = [fault for one in seen.values() for fault in one.faults]
    # What MiniStack itself adds there reads nobody.
    faults = [fault for fault in faults if not fault.startswith("CreateVpc.vpc.")]
    assert not faults, "\n".join(dict.fromkeys(faults))
