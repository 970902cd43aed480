"""Puts the project's plugins on the import path, under the names that Ansible gives them."""

import sys
from pathlib import Path

import ansible.module_utils
from hypothesis import HealthCheck, settings

# The same examples in every run, and as much time as the machine needs; `--hypothesis-profile default` looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

PROJECT = Path(__file__).resolve().parents[2]

# What comes later is found first: an action bears its module's name, and a test that imports the name means the module.
for _folder in ("plugins/filter", "plugins/action", "plugins/modules", "plugins/callback", "tools"):
    sys.path.insert(0, str(PROJECT / _folder))
# Shared code is imported as `ansible.module_utils.<name>`, in tests as in a run.
ansible.module_utils.__path__.append(str(PROJECT / "plugins" / "module_utils"))
