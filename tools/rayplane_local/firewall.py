"""Taking the cluster's firewall rules out again, and nothing else."""

from __future__ import annotations

import re
import shutil

from .shell import run

# kube-proxy's and the kubelet's chains, and those of the CNI plugins.
_OURS = re.compile(r"(KUBE|CNI)-")
TOOLS = ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy")


def removal(saved: str) -> str:
    """Input for `iptables-restore --noflush` that removes our chains, and every rule that jumps to them, from what
    iptables-save printed.

    Rules and chains of others are not named in it, so they stay whatever happens to them meanwhile. Empty where nothing
    is ours.
    """
    output: list[str] = []
    table, chains, rules = "", list[str](), list[str]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table, chains, rules = line, [], []
        elif line.startswith(":") and _OURS.match(line[1:]):
            chains.append(line[1:].split()[0])
        elif line.startswith("-A ") and not _OURS.match(line[3:]):
            target = re.search(r" -[jg] (\S+)", line)
            if target and _OURS.match(target[1]):
                rules.append(f"-D {line[3:]}")
        elif line == "COMMIT" and (chains or rules):
            flushes, deletions = [f"-F {chain}" for chain in chains], [f"-X {chain}" for chain in chains]
            output += [table, *rules, *flushes, *deletions, "COMMIT"]
    return "".join(f"{line}\n" for line in output)


def clean() -> int:
    """Remove our rules from both firewalls that iptables can speak to; gives the number of chains removed."""
    removed = 0
    for tool in TOOLS:
        if shutil.which(f"{tool}-save") is None:
            continue
        text = removal(run([f"{tool}-save"], check=False).stdout)
        if text:
            run([f"{tool}-restore", "--noflush"], stdin=text)
            removed += text.count("\n-X ")
    return removed
