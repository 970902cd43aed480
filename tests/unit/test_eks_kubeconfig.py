"""The kubeconfig: written once with mode 0600, repaired, checked when given."""

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.rayplane.platform.plugins.filter.rayplane_kubeconfig import kubeconfig_problem
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import eks_kubeconfig
from aws_fake import FakeClient, refusal

CLUSTER = {"endpoint": "https://c1", "certificateAuthority": {"data": "Q0E="}, "status": "ACTIVE"}


def write(path: Path, check: bool = False, **params: Any) -> Changes:
    def describe(**_: Any) -> Any:
        if params.get("absent"):
            raise refusal("ResourceNotFoundException")
        return {"cluster": {**CLUSTER, **params.get("cluster", {})}}

    changes = Changes(check)
    module = SimpleNamespace(
        params={
            "cluster_name": "c1",
            "path": str(path),
            "context": "",
            "state": "present",
            "command": [],
            "fallback": "/token.py",
            "token_profile": "prod",
        }
        | params,
        check_mode=check,
        region="us-west-2",
        tmpdir=str(path.parents[1]),
        client=lambda _: FakeClient("eks", describe_cluster=describe),
        get_bin_path=lambda _: params.get("aws"),
        atomic_move=lambda source, target: Path(source).replace(target),
    )
    eks_kubeconfig.reconcile(module, changes)
    return changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kube" / "config"


def test_it_is_written_once_with_a_private_mode(path: Path) -> None:
    assert write(path, check=True).actions == [f"create kubeconfig {path}"]
    assert not path.exists()
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert write(path).actions == []
    assert kubeconfig_problem(str(path)) == ""
    user = yaml.safe_load(path.read_text())["users"][0]["user"]["exec"]
    assert user["args"] == ["/token.py", "--cluster-name", "c1", "--region", "us-west-2"]
    assert user["env"] == [{"name": "AWS_PROFILE", "value": "prod"}]


def test_the_aws_cli_is_taken_where_it_is(path: Path) -> None:
    write(path, aws="/usr/bin/aws")
    assert yaml.safe_load(path.read_text())["users"][0]["user"]["exec"]["command"] == "aws"


def test_a_changed_endpoint_or_mode_is_repaired(path: Path) -> None:
    write(path)
    path.chmod(0o644)
    assert write(path, cluster={"endpoint": "https://c2"}).actions == [f"update kubeconfig {path}: content, mode"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_with_other_clusters_is_neither_replaced_nor_removed(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("clusters: [{name: mine, cluster: {}}]")
    for state in ("present", "absent"):
        with pytest.raises(PlatformError, match=r"holds other clusters \(mine\)"):
            write(path, state=state)
    path.write_text("just text")
    with pytest.raises(PlatformError, match="is no kubeconfig"):
        write(path)


def test_it_is_removed_once(path: Path) -> None:
    write(path)
    assert write(path, state="absent", check=True).actions == [f"delete kubeconfig {path}"]
    assert path.exists()
    write(path, state="absent")
    assert not path.exists()
    assert write(path, state="absent").actions == []


def test_a_cluster_that_is_not_there(path: Path) -> None:
    assert write(path, check=True, absent=True).actions == [f"create kubeconfig {path}"]
    with pytest.raises(PlatformError, match="does not exist"):
        write(path, absent=True)
    with pytest.raises(PlatformError, match="no endpoint yet"):
        write(path, cluster={"endpoint": ""})


@pytest.mark.parametrize(
    ("text", "context", "problem"),
    [
        (None, "", "no such file"),
        ("a: [", "", "no YAML"),
        ("[]", "", "no kubeconfig"),
        ("kind: Config", "", "no current-context"),
        ("kind: Config\ncontexts: [{name: a}]\ncurrent-context: b", "", "no context 'b'; it has: a"),
        ("kind: Config\ncontexts: [{name: a}]", "c", "no context 'c'"),
        ("kind: Config\ncontexts: [{name: a}]", "a", ""),
    ],
)
def test_a_given_file_is_checked(tmp_path: Path, text: str | None, context: str, problem: str) -> None:
    given = tmp_path / "given"
    if text is not None:
        given.write_text(text)
    found = kubeconfig_problem(str(given), context)
    assert problem in found
    assert bool(problem) == bool(found)
