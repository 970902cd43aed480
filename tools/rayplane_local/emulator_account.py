"""What an account has to give, which MiniStack 1.5 lacks: ``install()`` before it serves.

Service quotas of EC2: generous until RequestServiceQuotaIncrease names another value, which is granted at once (also a
lower one, so that a test can have a small account). Types of instances are offered in every zone.
"""

import json
import re
from typing import Any

from ministack import app  # type: ignore[import-not-found,unused-ignore]
from ministack.core import responses, router  # type: ignore[import-not-found,unused-ignore]
from ministack.services import ec2  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]

GENEROUS = 1000.0
TARGET = "ServiceQuotasV20190624"
TYPE = re.compile(r"[a-z][a-z0-9-]*\d[a-z0-9-]*\.(nano|micro|small|medium|large|\d*xlarge|metal(-\d+xl)?)")

#: Account, region and code -> value.
quotas: dict[tuple[str, str, str], float] = {}


async def service_quotas(_: str, __: str, headers: dict[str, str], body: bytes, ___: Any) -> Answer:
    """GetServiceQuota and RequestServiceQuotaIncrease."""
    operation = headers.get("x-amz-target", "").rpartition(".")[2]
    given = json.loads(body or b"{}")
    key = (responses.get_account_id(), responses.get_region(), given.get("QuotaCode", ""))
    quota = {"ServiceCode": given.get("ServiceCode"), "QuotaCode": key[2], "Unit": "None", "Adjustable": True}
    if operation == "GetServiceQuota":
        return _json(200, {"Quota": {**quota, "Value": quotas.get(key, GENEROUS)}})
    if operation == "RequestServiceQuotaIncrease":
        quotas[key] = float(given["DesiredValue"])
        request = {"Id": "1", "ServiceCode": given.get("ServiceCode"), "QuotaCode": key[2], "Status": "APPROVED"}
        return _json(200, {"RequestedQuota": {**request, "DesiredValue": quotas[key]}})
    return _json(400, {"__type": "UnknownOperationException", "message": operation})


def _json(status: int, body: dict[str, Any]) -> Answer:
    return status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(body).encode()


def describe_instance_type_offerings(params: Any) -> Answer:
    """DescribeInstanceTypeOfferings: by zone, of the types that are asked for."""
    filters = ec2._parse_filters(params)
    region = responses.get_region()
    items = "".join(
        f"<item><instanceType>{kind}</instanceType><locationType>availability-zone</locationType>"
        f"<location>{region}{letter}</location></item>"
        for kind in filters.get("instance-type", [])
        if TYPE.fullmatch(kind)
        for letter in "abc"
    )
    answer: Answer = ec2._xml(
        200, "DescribeInstanceTypeOfferingsResponse", f"<instanceTypeOfferingSet>{items}</instanceTypeOfferingSet>"
    )
    return answer


def install() -> None:
    """Put these beside MiniStack's own."""
    router.SERVICE_PATTERNS["servicequotas"] = {"target_prefixes": [TARGET]}
    app.SERVICE_HANDLERS["servicequotas"] = service_quotas
    ec2._ACTION_MAP.setdefault("DescribeInstanceTypeOfferings", describe_instance_type_offerings)
