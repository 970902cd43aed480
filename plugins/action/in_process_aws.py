# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Modules that talk to AWS, run in the task's own process; the SDK is imported before."""

from ansible_collections.rayplane.platform.plugins.plugin_utils.warm_module import ActionModule, preload

__all__ = ["ActionModule"]

preload("aws_", "eks_", "ecr_")
