"""A stand-in for a boto3 client: answers come from the test, arguments are checked against the service's own model."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import botocore.session
from ansible_collections.rayplane.platform.plugins.module_utils.aws import core as rayplane_aws
from botocore.exceptions import ClientError
from botocore.model import ServiceModel
from botocore.validate import ParamValidator

Handler = Callable[..., Any]


@cache
def _model(service: str) -> ServiceModel:
    return botocore.session.get_session().get_service_model(service)


def refusal(code: str, message: str = "no") -> ClientError:
    """Return the error a client raises for an AWS error code."""
    return ClientError({"Error": {"Code": code, "Message": message}}, "Operation")


class FakeClient:
    """A client whose operations are functions of the test; unknown operations fail the test."""

    def __init__(self, service: str, **handlers: Handler) -> None:
        self.meta = SimpleNamespace(service_model=_model(service))
        self.handlers = handlers
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, operation: str) -> Handler:
        def call(**arguments: Any) -> Any:
            self._validate(operation, arguments)
            self.calls.append((operation, arguments))
            assert operation in self.handlers, f"unexpected call of {operation} with {arguments}"
            return self.handlers[operation](**arguments)

        return call

    def get_paginator(self, operation: str) -> Any:
        """Return a paginator of one page."""
        return SimpleNamespace(paginate=lambda **arguments: [getattr(self, operation)(**arguments)])

    def writes(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the calls that change something, in order."""
        return [call for call in self.calls if not call[0].startswith(("describe_", "list_", "get_", "head_"))]

    def _validate(self, operation: str, arguments: dict[str, Any]) -> None:
        names = {"".join(part.title() for part in operation.split("_")).lower(): operation}
        model = self.meta.service_model
        name = next(one for one in model.operation_names if one.lower() in names)
        report = ParamValidator().validate(arguments, model.operation_model(name).input_shape)
        assert not report.has_errors(), f"{operation}: {report.generate_report()}"


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr(rayplane_aws, "_sleep", self.sleep)
        monkeypatch.setattr(rayplane_aws, "_now", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        """Let time pass at once."""
        self.now += seconds
