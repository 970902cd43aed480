# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Filter that says what is wrong with a kubeconfig file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["FilterModule", "kubeconfig_problem"]


def kubeconfig_problem(path: str, context: str = "") -> str:
    """Return why a kubeconfig file cannot be used, or an empty string.

    ``context`` is the context to use; empty means the file's own choice. The cluster itself is not asked.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "there is no such file"
    except (OSError, UnicodeDecodeError) as error:
        return f"the file cannot be read: {error}"
    except yaml.YAMLError as error:
        return f"the file is no YAML: {' '.join(str(error).split())}"
    if not isinstance(content, dict) or content.get("kind") != "Config":
        return "the file is no kubeconfig: it has no 'kind: Config'"
    contexts = _names(content, "contexts")
    wanted = context or content.get("current-context") or ""
    if not wanted:
        known = ", ".join(contexts) or "none there"
        return f"the file has no current-context; set platform_kube_context to one of: {known}"
    if wanted not in contexts:
        return f"the file has no context {wanted!r}; it has: {', '.join(contexts) or 'none'}"
    return ""


def _names(content: dict[str, Any], key: str) -> list[str]:
    return [str(item.get("name")) for item in content.get(key) or [] if isinstance(item, dict)]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"kubeconfig_problem": kubeconfig_problem}
