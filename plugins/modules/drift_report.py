# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_report
short_description: Report what differs from what is declared
description:
  - Puts together what M(rayplane.platform.drift_stage) has noted, shows it as a table, and writes C(drift.json) and
    C(drift.md).
  - Sets the custom statistic C(exit_code), C(0) where nothing differs, C(2) where something does, C(1) where not all
    could be compared.
author: rayplane contributors (@rayplane)
options:
  folder:
    description: Where the files go. Without it none are written, as in a plan.
    type: path
  begin:
    description: Only note that nothing has been compared yet, so that no earlier report is taken for this run's.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Report what differs
  rayplane.platform.drift_report:
    folder: drift
  run_once: true
"""
