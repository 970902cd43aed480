# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_stage
short_description: Note what a stage in check mode found
description:
  - Looks at the results that the host's tasks have registered, for the report at the end of the run.
  - The task registers its result as C(__drift_noted).
author: rayplane contributors (@rayplane)
options:
  stage:
    description: The stage's role.
    type: str
    required: true
  task:
    description: Name of the task that failed, where one did.
    type: str
  result:
    description: Its result.
    type: dict
"""

EXAMPLES = r"""
- name: Note what differs in the network
  rayplane.platform.drift_stage:
    stage: network
  register: __drift_noted
"""
