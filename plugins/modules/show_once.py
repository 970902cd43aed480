# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: show_once
short_description: Show a secret on the screen, once
description:
  - It goes into no log file and into no result. In check mode nothing is shown.
author: rayplane contributors (@rayplane)
options:
  text:
    description: What is shown.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show the key
  rayplane.platform.show_once:
    text: "{{ key }}"
  no_log: true
"""
