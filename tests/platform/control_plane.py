"""etcd, kube-apiserver and kube-controller-manager alone: an API that takes objects, without a node or root."""

from __future__ import annotations

import secrets
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from rayplane_local.shell import DIE_WITH_PARENT

READY_S = 120.0


def _port(stack: ExitStack) -> int:
    """A port that stays this process's: a server that shares ports (SO_REUSEPORT) listens on it, nobody else can."""
    one = stack.enter_context(socket.socket())
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", 0))
    return int(one.getsockname()[1])


def _account_key(file: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def _kubeconfig(file: Path, server: str, token: str) -> None:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "alone",
        "contexts": [{"name": "alone", "context": {"cluster": "alone", "user": "admin"}}],
        "clusters": [{"name": "alone", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": token}}],
    }
    file.write_text(yaml.safe_dump(content))


@contextmanager
def control_plane(programs: dict[str, Path], folder: Path) -> Iterator[Path]:
    """Run the three programs; yields the administrator's kubeconfig."""
    with ExitStack() as stack:
        client, peer, secure, manager = (_port(stack) for _ in range(4))
        etcd, server = f"http://127.0.0.1:{client}", f"https://127.0.0.1:{secure}"
        token, key, kubeconfig = secrets.token_hex(16), folder / "account.key", folder / "kubeconfig"
        (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        _account_key(key)
        _kubeconfig(kubeconfig, server, token)
        commands = {
            "etcd": [
                f"--data-dir={folder}/etcd",
                "--unsafe-no-fsync",
                "--socket-reuse-port",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
            ],
            "kube-apiserver": [
                f"--etcd-servers={etcd}",
                "--bind-address=127.0.0.1",
                f"--secure-port={secure}",
                "--permit-port-sharing",
                f"--cert-dir={folder}/certificates",
                f"--token-auth-file={folder}/tokens.csv",
                "--allow-privileged",
                "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
            ],
            # Namespaces end, owners' objects go, DaemonSets count their nodes.
            "kube-controller-manager": [
                f"--kubeconfig={kubeconfig}",
                "--bind-address=127.0.0.1",
                f"--secure-port={manager}",
                "--permit-port-sharing",
                "--leader-elect=false",
                f"--service-account-private-key-file={key}",
            ],
        }
        running = {}
        for name, arguments in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            running[name] = subprocess.Popen(
                [*DIE_WITH_PARENT, programs[name], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(running[name].wait, 20)
            stack.callback(running[name].kill)
        _wait_until_ready(server, token, running, folder)
        yield kubeconfig


def _wait_until_ready(server: str, token: str, running: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    request = urllib.request.Request(f"{server}/readyz", headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
    )
    end = time.monotonic() + READY_S
    while True:
        try:
            with direct.open(request, timeout=5):
                return
        except OSError as error:
            ended = [name for name, process in running.items() if process.poll() is not None]
            names = ended or ["kube-apiserver"]
            logs = "\n".join((folder / f"{name}.log").read_text(errors="replace")[-2000:] for name in names)
            assert not ended, f"{', '.join(ended)} ended before the API was ready:\n{logs}"
            assert time.monotonic() < end, f"the API was not ready after {READY_S:.0f} s: {error}\n{logs}"
        time.sleep(0.2)
