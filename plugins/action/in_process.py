# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Modules that run in the task's own process."""

from ansible_collections.rayplane.platform.plugins.plugin_utils.warm_module import ActionModule

__all__ = ["ActionModule"]
