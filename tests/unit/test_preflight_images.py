"""Preflight's rules of images: no name that nodes cannot pull, and none that has nowhere to go."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.images.registry import RegistryError
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import images as rayplane_preflight_images
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.images import check_images, images
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem

GOOD: dict[str, Any] = {
    "platform": "existing",
    "rayservice_image": "rayproject/ray-llm:2.60.0-py312-cu130",
    "rayservice_image_pull_policy": "IfNotPresent",
    "rayservice_image_pull_secrets": [],
    "gateway_image": "registry.of.ours/gateway:1",
    "gateway_image_pull_policy": "IfNotPresent",
    "gateway_redis": "in_cluster",
    "gateway_redis_image": "docker.io/library/redis:7",
    "kuberay_image": "",
    "images_tool": "auto",
    "images_base": "python:3.11",
    "images_registry": "",
    "images_ray_packages": [],
}


def by_variable(found: Any) -> dict[str, Problem]:
    return {problem.variable: problem for problem in found}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"platform": "aws", "gateway_image": "", "images_ray_packages": ["peft"]},
        {"gateway_image": "", "images_registry": "registry.of.ours/team"},
        {"gateway_image": "registry.example.com/a", "gateway_enabled": False},
        {"gateway_redis_image": "localhost/redis:1", "gateway_redis": "redis://x:6379/0"},
        {"rayservice_image": "localhost/ray:1", "rayservice_image_pull_policy": "Never"},
        {"rayservice_image": "localhost/ray:1", "group_names": ["embedded"]},
        {
            "gateway_image": "",
            "images_registry": "127.0.0.1:5000/x",
            "images_base": "/b.tar",
            "group_names": ["embedded"],
        },
    ],
)
def test_good_values_have_no_problem(changes: dict[str, Any]) -> None:
    assert by_variable(images(GOOD | changes)) == {}


@pytest.mark.parametrize(
    ("changes", "variable", "reason"),
    [
        ({"gateway_image": "registry.example.com/gateway:1"}, "gateway_image", "placeholder"),
        ({"gateway_image": "localhost/gateway:1"}, "gateway_image", "each node itself"),
        ({"gateway_image": "", "images_registry": "127.0.0.1:5000/x"}, "images_registry", "each node itself"),
        (
            {"gateway_image": "", "images_registry": "https://of.ours"},
            "images_registry",
            "no container runtime",
        ),
        ({"gateway_image": ""}, "gateway_image", "images_registry names no registry"),
        ({"images_ray_packages": ["peft"]}, "images_ray_packages", "images_registry names no registry"),
        ({"images_ray_packages": ["x"], "platform": "aws", "images_base": "a.test/b"}, "images_base", "placeholder"),
        ({"rayservice_image": "REGISTRY/ray:1"}, "rayservice_image", "no container runtime"),
        ({"rayservice_worker_groups": [{"image": "a.invalid/b"}]}, "rayservice_worker_groups[0].image", "placeholder"),
        ({"gateway_redis_image": "127.0.0.1:5000/redis"}, "gateway_redis_image", "each node itself"),
        ({"gateway_image": "example.org/a", "group_names": ["embedded"]}, "gateway_image", "placeholder"),
    ],
)
def test_problems(changes: dict[str, Any], variable: str, reason: str) -> None:
    found = by_variable(images(GOOD | changes))
    assert set(found) == {variable}
    assert reason in found[variable].reason and found[variable].cure and not found[variable].warning


@pytest.mark.parametrize(
    ("answer", "changes", "variables"),
    [
        ("sha256:x", {}, set()),
        (None, {}, {"rayservice_image", "gateway_image", "gateway_redis_image"}),
        (None, {"gateway_image_pull_policy": "Never", "rayservice_image": "a b"}, set()),
        # Only public registries tell by a refusal, and only to who has no credentials.
        (401, {}, {"rayservice_image", "gateway_redis_image"}),
        (401, {"gateway_image_pull_secrets": ["s"]}, {"rayservice_image"}),
        (0, {}, set()),
        (503, {}, set()),
    ],
)
def test_registries_are_asked(
    answer: Any, changes: dict[str, Any], variables: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest_of(*_: Any, **__: Any) -> Any:
        if isinstance(answer, int):
            raise RegistryError("no", answer)
        return answer

    monkeypatch.setattr(rayplane_preflight_images, "digest_of", digest_of)
    found = by_variable(check_images(GOOD | changes))
    assert set(found) == variables
    assert not any(problem.warning for problem in found.values())


@pytest.mark.parametrize("tool", ["auto", "podman"])
def test_a_missing_tool_is_told(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(rayplane_preflight_images, "digest_of", lambda *_, **__: "sha256:x")
    assert by_variable(check_images(GOOD)) == {}
    (problem,) = check_images(GOOD | {"gateway_image": "", "images_tool": tool})
    assert problem.variable == "images_tool" and problem.warning
