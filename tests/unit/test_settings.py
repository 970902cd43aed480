"""The lookup that hands a role's variables on."""

from __future__ import annotations

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.rayplane.platform.plugins.lookup.settings import LookupModule


def test_variables_of_a_role_lose_their_prefix_and_are_resolved() -> None:
    variables = {
        "storage_size": trust_as_template("{{ platform_size }}Gi"),
        "platform_size": 3,
        # Another role's, whose name begins alike.
        "storage_class_name": "gp3",
        "storages": "nobody's",
    }
    loader = DataLoader()
    lookup = LookupModule(loader=loader, templar=Templar(loader=loader, variables=variables))
    assert lookup.run(["storage", "storage_class"], variables) == [{"size": "3Gi"}, {"name": "gp3"}]
