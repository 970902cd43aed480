"""Argument specs are read from documentation, and what the code looks up is among the choices."""

from __future__ import annotations

from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import LOG_WRITERS
from ansible_collections.rayplane.platform.plugins.modules import (
    aws_buckets,
    aws_interruption_queue,
    eks_node_groups,
)

DOCUMENTATION = """
options:
  name:
    description: A name.
    type: str
    required: true
  password:
    description: A secret.
    type: str
    default: ""
  entries:
    description: A list.
    type: list
    elements: dict
    default: []
    suboptions:
      key_name:
        description: The name of a key.
        type: str
        choices: [a, b]
"""


def test_what_is_documented_is_what_is_taken() -> None:
    assert argument_spec(DOCUMENTATION, secret=("password",)) == {
        "name": {"type": "str", "required": True, "no_log": False},
        "password": {"type": "str", "default": "", "no_log": True},
        "entries": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "no_log": False,
            "options": {"key_name": {"type": "str", "choices": ["a", "b"], "no_log": False}},
        },
    }


def test_choices_are_what_the_code_looks_up() -> None:
    bucket = argument_spec(aws_buckets.DOCUMENTATION)["buckets"]["options"]
    assert set(bucket["log_writers"]["choices"]) == set(LOG_WRITERS)
    queue = argument_spec(aws_interruption_queue.DOCUMENTATION)
    assert set(queue["events"]["choices"]) == set(queue["events"]["default"]) == set(aws_interruption_queue.EVENTS)
    group = argument_spec(eks_node_groups.DOCUMENTATION)["node_groups"]["options"]
    assert set(group["taints"]["options"]["effect"]["choices"]) == set(eks_node_groups.EFFECTS)
