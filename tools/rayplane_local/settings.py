"""What the local platform is told: values from the role's variables, and the paths that follow from them."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent

# Sockets live in a short path of their own: the kernel allows 107 characters, and a home folder can be longer.
RUN = Path("/run/rayplane")
KUBERNETES_FOLDER = Path("/etc/kubernetes")
KUBELET_FOLDER = Path("/var/lib/kubelet")
MARKER = ".rayplane"


def _from_text(name: str, text: str, kind: type) -> bool | int | float:
    """A value that came as text: Ansible's `-e name=value` gives nothing else."""
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise ValueError(f"{name} must be true or false, not {text!r}")
        return words[text.lower()]
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text!r}") from None


@dataclass(frozen=True)
class Settings:
    """Inputs of the local platform. Sizes are GiB, ports TCP ports."""

    home: Path
    source: str = "auto"
    release_bases: Mapping[str, str] = field(default_factory=dict)
    release_checksums: Mapping[str, str] = field(default_factory=dict)
    probe_seconds: float = 3.0
    address: str = "10.97.0.1"
    interface: str = "rayplane0"
    pod_subnet: str = "10.244.0.0/16"
    node_pod_subnet: str = "10.244.0.0/24"
    service_subnet: str = "10.96.0.0/16"
    node_name: str = "rayplane"
    api_port: int = 6443
    emulator_port: int = 4566
    emulator_region: str = "us-west-2"
    node_ports: tuple[int, ...] = (30080,)
    ray_image: str = "localhost/rayplane/ray:2.60.0-cpu"
    gateway_image: str = "localhost/rayplane/gateway:0.1.0"
    redis_image: str = "localhost/rayplane/redis:7.0.15"
    memory_gib: float = 12.0
    disk_gib: float = 32.0
    disk_warm_gib: float = 6.0
    keep_build_cache: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from plain values; an unknown name is an error, so that nothing is silently ignored."""
        given = dict(values)
        bases = {name: given.pop(f"release_base_{name}", "") for name in ("kubernetes", "etcd")}
        given = {"release_bases": bases, **given}
        unknown = sorted(set(given) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings of the local platform: {', '.join(unknown)}")
        given["home"] = Path(given["home"]).expanduser()
        if not given["home"].is_absolute():
            raise ValueError(f"the local platform's home must be an absolute path, not {given['home']}")
        for item in dataclasses.fields(cls):
            if isinstance(given.get(item.name), str) and isinstance(item.default, (bool, int, float)):
                given[item.name] = _from_text(item.name, given[item.name], type(item.default))
        if "node_ports" in given:
            given["node_ports"] = tuple(int(port) for port in given["node_ports"])
        if given.get("source", "auto") not in ("auto", "release", "build"):
            raise ValueError(f"source must be auto, release or build, not {given['source']!r}")
        settings = cls(**given)
        settings.check_addresses()
        return settings

    def check_addresses(self) -> None:
        """Raise ValueError where the subnets overlap, or hold the platform's address."""
        subnets = {
            "local_platform_pod_subnet": ipaddress.ip_network(self.pod_subnet),
            "local_platform_service_subnet": ipaddress.ip_network(self.service_subnet),
        }
        pods, cluster_ips = subnets.values()
        for name, subnet in subnets.items():
            if ipaddress.ip_address(self.address) in subnet:
                raise ValueError(
                    f"{name} ({subnet}) holds local_platform_address ({self.address}): choose one outside it."
                )
        if pods.overlaps(cluster_ips):
            raise ValueError(
                f"local_platform_pod_subnet ({pods}) and local_platform_service_subnet ({cluster_ips}) overlap."
            )
        node = ipaddress.ip_network(self.node_pod_subnet)
        if not (node.network_address in pods and node.prefixlen >= pods.prefixlen):
            raise ValueError(
                f"local_platform_node_pod_subnet ({node}) is not inside local_platform_pod_subnet ({pods})."
            )

    @property
    def state(self) -> Path:
        """Everything that taking the platform down removes."""
        return self.home / "state"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def parts(self) -> Path:
        return self.home / "parts"

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    @property
    def build_logs(self) -> Path:
        return self.home / "logs"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        return RUN / "containerd.sock"

    @property
    def supervisor_socket(self) -> Path:
        return RUN / "supervisor.sock"
