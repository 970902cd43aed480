"""The supervised processes: containerd, the kubelet and the AWS emulator.

supervisord (the `supervisor` package) starts them, restarts what dies and keeps their logs. Each of them dies with its
supervisor, so a killed supervisor leaves nothing behind that a new one would run into; containers live on under their
own shims.
"""

from __future__ import annotations

import configparser
import http.client
import io
import json
import os
import shlex
import signal
import socket
import time
import urllib.error
import urllib.request
import xmlrpc.client
from pathlib import Path
from typing import Any

from . import images, network, parts, python_env
from .errors import PlatformError
from .keys import write_text
from .locking import start_time
from .progress import Step
from .settings import KUBELET_FOLDER, KUBERNETES_FOLDER, RUN, Settings
from .shell import run, wait_for

PROGRAMS = ("containerd", "kubelet", "emulator")
CNI_PROGRAMS = Path("/usr/lib/cni")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


def supervisor(settings: Settings) -> Any:
    """The supervisor's own interface (XML-RPC over its socket; see supervisor's documentation,
    `supervisor.rpcinterface`).
    """
    return xmlrpc.client.ServerProxy(
        "http://localhost", transport=_UnixTransport(str(settings.supervisor_socket))
    ).supervisor


def supervisor_pid(settings: Settings) -> int | None:
    """The running supervisor's process id, or None where none of ours runs."""
    try:
        return (
            int((settings.state / "supervisor" / "supervisord.pid").read_text())
            if supervisor(settings).getState()
            else None
        )
    except (OSError, ValueError, http.client.HTTPException, xmlrpc.client.Error):
        return None


def states(settings: Settings) -> dict[str, str]:
    """The state of every supervised process, by name; empty where no supervisor runs."""
    try:
        return {item["name"]: item["statename"] for item in supervisor(settings).getAllProcessInfo()}
    except (OSError, http.client.HTTPException, xmlrpc.client.Error):
        return {}


def containerd_config(settings: Settings) -> str:
    """containerd's configuration (version 2): CRI only, with its data below the state folder."""
    state = settings.state / "containerd"
    return f"""version = 2
root = "{state}/root"
state = "{state}/run"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = "{settings.containerd_socket}"

[plugins."io.containerd.grpc.v1.cri"]
# Without CAP_SYS_RESOURCE runc cannot lower a score: containers would die at their start.
restrict_oom_score_adj = true
sandbox_image = "{images.PAUSE_IMAGE}"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PROGRAMS}"
conf_dir = "{settings.state}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def cni_config(settings: Settings) -> str:
    """One bridge for all pods of the one node, and host ports."""
    bridge = {
        "type": "bridge",
        "bridge": network.POD_BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{settings.state}/cni-addresses",
            "ranges": [[{"subnet": settings.node_pod_subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    return json.dumps({"cniVersion": "1.0.0", "name": "rayplane", "plugins": plugins}, indent=2) + "\n"


def kubelet_script(settings: Settings) -> str:
    """Waits for what kubeadm writes, then becomes the kubelet."""
    config, flags = KUBELET_FOLDER / "config.yaml", KUBELET_FOLDER / "kubeadm-flags.env"
    kubelet = shlex.quote(str(parts.program(settings, "kubelet")))
    return f"""#!/bin/sh
set -eu
until [ -s {config} ] && [ -s {flags} ]; do sleep 0.2; done
. {flags}
exec {kubelet} --config={config} --kubeconfig={KUBERNETES_FOLDER}/kubelet.conf \\
    --bootstrap-kubeconfig={KUBERNETES_FOLDER}/bootstrap-kubelet.conf $KUBELET_KUBEADM_ARGS
"""


def supervisor_config(settings: Settings) -> str:
    """supervisord's configuration with the three programs."""
    services = python_env.folder(settings, "services")
    emulator, emulator_home = settings.state / "supervisor" / "emulator.py", settings.state / "emulator"
    emulator_binds = f"127.0.0.1:{settings.emulator_port} {settings.address}:{settings.emulator_port}"
    emulator_environment = {
        "GATEWAY_PORT": str(settings.emulator_port),
        "MINISTACK_REGION": settings.emulator_region,
        "PERSIST_STATE": "1",
        "STATE_DIR": f"{emulator_home}/services",
        "S3_PERSIST": "1",
        "S3_DATA_DIR": f"{emulator_home}/buckets",
        "TMPDIR": str(emulator_home / "tmp"),
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
        "LOG_LEVEL": "WARNING",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    commands = {
        "containerd": f"setpriv --pdeathsig KILL containerd --config {settings.state}/containerd/config.toml",
        "kubelet": f"setpriv --pdeathsig KILL {settings.state}/supervisor/kubelet.sh",
        "emulator": f"setpriv --pdeathsig KILL {services}/bin/python -B {emulator} {emulator_binds}",
    }
    environments = {"containerd": {}, "kubelet": {}, "emulator": emulator_environment}
    config = configparser.RawConfigParser()
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config["unix_http_server"] = {"file": str(settings.supervisor_socket), "chmod": "0700"}
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    config["supervisord"] = {
        "pidfile": f"{settings.state}/supervisor/supervisord.pid",
        "logfile": f"{settings.logs}/supervisord.log",
        "childlogdir": str(settings.logs),
        "directory": "/",
    }
    for number, (name, command) in enumerate(commands.items()):
        environment = {"PATH": images.PATH, **environments[name]}
        config[f"program:{name}"] = {
            "command": command,
            "environment": ",".join(f'{key}="{value}"' for key, value in environment.items()),
            "priority": str(100 + number),
            "autostart": "true",
            "autorestart": "true",
            "startsecs": "1",
            "startretries": "1000000",
            "stopwaitsecs": "20",
            "killasgroup": "false",
            "redirect_stderr": "true",
            "stdout_logfile": f"{settings.logs}/{name}.log",
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": "2",
        }
    output = io.StringIO()
    config.write(output)
    return output.getvalue().replace("%", "%%")


def files(settings: Settings) -> dict[Path, tuple[str, int, str]]:
    """Configuration files: path, then text, mode, and the process that reads it at its start."""
    state = settings.state
    return {
        state / "containerd" / "config.toml": (containerd_config(settings), 0o644, "containerd"),
        state / "cni" / "10-rayplane.conflist": (cni_config(settings), 0o644, ""),
        state / "supervisor" / "kubelet.sh": (kubelet_script(settings), 0o755, "kubelet"),
        # Copies: the processes must not need the checkout that started them.
        **{
            state / "supervisor" / path.name: (path.read_text(), 0o644, "emulator")
            for path in sorted(Path(__file__).parent.glob("emulator*.py"))
        },
        state / "supervisor" / "supervisord.conf": (supervisor_config(settings), 0o600, "supervisord"),
    }


def stale_files(settings: Settings) -> list[Path]:
    return [path for path, (text, _, _) in files(settings).items() if not path.is_file() or path.read_text() != text]


def pending(settings: Settings) -> list[str]:
    """What is not as it should be."""
    wanted = network.pending(settings)
    wanted += [f"file {path.relative_to(settings.home)}" for path in stale_files(settings)]
    now = states(settings)
    wanted += [f"process {name}" for name in PROGRAMS if now.get(name) != "RUNNING"]
    return wanted


def start(settings: Settings, step: Step) -> None:
    """Bring the address, the configuration and the processes up, restarting exactly the processes whose configuration
    changed.
    """
    network.set_up(settings)
    RUN.mkdir(mode=0o700, exist_ok=True)
    for folder in (settings.logs, settings.state / "emulator" / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    stale = {files(settings)[path][2] for path in stale_files(settings)}
    for path, (text, mode, _) in files(settings).items():
        write_text(path, text, mode)
    if supervisor_pid(settings) is None:
        clear_stale(settings)
        # With an empty environment: that of the run that happened to start it (proxies, credentials) is nobody's
        # business here.
        command: list[str | Path] = [
            python_env.folder(settings, "services") / "bin" / "supervisord",
            "--configuration",
            settings.state / "supervisor" / "supervisord.conf",
        ]
        run(["env", "--ignore-environment", f"PATH={images.PATH}", "HOME=/root", "LANG=C.UTF-8", *command])
        wait_for("the supervisor", lambda: "" if states(settings) else "its socket does not answer", step, seconds=20)
    elif "supervisord" in stale:
        reload(settings)
    server = supervisor(settings)
    for name in PROGRAMS:
        state = states(settings).get(name)
        if name in stale and state == "RUNNING":
            server.stopProcess(name)
            state = "STOPPED"
        if state in ("STOPPED", "EXITED", "FATAL"):
            server.startProcess(name, False)
    wait_for("containerd", lambda: containerd_error(settings), step, seconds=60)
    wait_for("the AWS emulator", lambda: emulator_error(settings), step, seconds=60)
    wait_for("the processes", lambda: not_running(settings), step, seconds=30)


def reload(settings: Settings) -> None:
    """Make a running supervisor take its configuration over: what changed is stopped, removed and added again."""
    server = supervisor(settings)
    added, changed, removed = server.reloadConfig()[0]
    for name in (*changed, *removed):
        server.stopProcessGroup(name)
        server.removeProcessGroup(name)
    for name in (*added, *changed):
        server.addProcessGroup(name)


def clear_stale(settings: Settings) -> None:
    """Remove what a machine that stopped left: sockets nobody listens on, and a supervisor that does not answer."""
    pid_file = settings.state / "supervisor" / "supervisord.pid"
    try:
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        pid, words = 0, []
    if str(settings.state / "supervisor" / "supervisord.conf").encode() in words:
        end_process(pid)
    pid_file.unlink(missing_ok=True)
    settings.supervisor_socket.unlink(missing_ok=True)


def end_process(pid: int, seconds: float = 15) -> None:
    """End one process: politely, then for good."""
    began = start_time(pid)
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if began is None or start_time(pid) != began:
                return
            time.sleep(0.05)
    raise PlatformError(f"process {pid} does not end")


def containerd_error(settings: Settings) -> str:
    done = run(images.ctr(settings, "version"), check=False)
    return "" if done.returncode == 0 else f"{done.stderr.strip()[-300:]}; its log: {settings.logs}/containerd.log"


def emulator_error(settings: Settings) -> str:
    for address in ("127.0.0.1", settings.address):
        url = f"http://{address}:{settings.emulator_port}/_ministack/health"
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
                pass
        except (OSError, urllib.error.URLError) as error:
            return f"{url}: {error}; its log: {settings.logs}/emulator.log"
    return ""


def not_running(settings: Settings) -> str:
    now = states(settings)
    return ", ".join(
        f"{name} is {now.get(name, 'unknown')}; its log: {settings.logs}/{name}.log"
        for name in PROGRAMS
        if now.get(name) != "RUNNING"
    )
