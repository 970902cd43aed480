# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: local_platform
short_description: Run one stage of the local platform
description:
  - Brings up, piece by piece, a Kubernetes and an AWS emulator on the machine that runs Ansible, or takes them down.
  - Progress is shown as it comes.
author: rayplane contributors (@rayplane)
options:
  stage:
    description: A stage of C(tools/rayplane_local/stages.py), or C(down).
    type: str
    required: true
  settings:
    description: The values of C(rayplane_local.settings.Settings).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Start Kubernetes
  rayplane.platform.local_platform:
    stage: cluster
    settings: "{{ __local_platform_settings }}"
"""
