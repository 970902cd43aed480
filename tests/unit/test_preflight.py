"""How preflight tells its problems, and how it checks names, types and choices against the specs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import (
    ABSENT,
    Problem,
    is_secret,
    nearest,
    render,
    show,
    split_path,
    step,
)
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.specs import check_options, check_unknown
from hypothesis import given
from hypothesis import strategies as st

KNOWN = {"network_vpc_cidr", "rayservice_models", "rayservice_name", "platform", "platform_region", "eks_version"}
ROLES = {"network", "rayservice", "eks"}


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_names_variable_value_place_reason_and_cure() -> None:
    text = render([Problem("eks_version", 1.3, "it is a number", "quote it", "hosts:3")], "prod")
    assert text == (
        "Preflight: 1 problem in cluster prod; nothing has been changed\n"
        "\n"
        "  1. eks_version   (hosts:3)\n"
        "     value   1.3\n"
        "     reason  it is a number\n"
        "     cure    quote it\n"
    )


def test_report_counts_and_wraps() -> None:
    problems = [Problem("a", ABSENT, "because " * 40, "do"), Problem("b", None, "so", "do")]
    text = render(problems, "prod")
    assert "2 problems" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "value   (absent)" in text
    assert "value   null" in text


def test_report_of_warnings_and_of_nothing() -> None:
    assert render([Problem("a", 1, "r", "c", warning=True)], "x", warning=True).startswith(
        "Preflight: 1 warning in cluster x\n"
    )
    assert render([], "x") == ""


@pytest.mark.parametrize(
    "name",
    ["secrets_hugging_face_token", "secrets_aws_secret_access_key", "verify_api_key", "models[0].env.MY_PASSWORD"],
)
def test_secrets_are_not_shown(name: str) -> None:
    assert is_secret(name)
    assert "sesame" not in render([Problem(name, "sesame", "r", "c")], "x")
    assert Problem(name, "sesame", "r", "c").as_dict()["value"] == "(not shown)"


@pytest.mark.parametrize("name", ["secrets_aws_name", "engine.max_tokens", "eks_secrets_enabled", "platform_region"])
def test_what_only_sounds_secret_is_shown(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("engine.long_prefill_token_threshold", 4096, True),
        ("gateway_roles.free.tokens_per_minute", 0.5, True),
        ("engine.skip_tokenizer_init", True, True),
        ("engine.tokenizer_mode", "fast", True),
        ("redis_password", 12345678, False),
        ("env.API_TOKEN", 12345678, False),
        ("token_of_mine", "sesame", False),
    ],
)
def test_numbers_about_tokens_are_shown(name: str, value: object, shown: bool) -> None:
    assert (Problem(name, value, "r", "c").as_dict()["value"] == json.dumps(value)) is shown


def test_long_values_are_cut() -> None:
    assert len(show(["x" * 50] * 50)) <= 120


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_every_value_can_be_shown_on_one_line(value: Any) -> None:
    assert "\n" not in show(value)


def test_paths() -> None:
    data = {"models": [{"id": "x", "replicas": {"min": 1}}]}
    parts = split_path("models[0].replicas.min")
    assert parts == ["models", 0, "replicas", "min"]
    value: object = data
    for part in parts:
        value = step(value, part)
    assert value == 1
    assert step(data, "other") is ABSENT
    assert step("text", 0) is ABSENT
    assert step([1], 5) is ABSENT


def test_nearest() -> None:
    assert nearest("rayservice_modles", KNOWN) == "rayservice_models"
    assert nearest("zzz", KNOWN) is None


# --- unknown names ---------------------------------------------------------------------------------------------------


def unknown(*names: str, **options: Any) -> dict[str, Problem]:
    problems = check_unknown(names, KNOWN, ROLES, dict.fromkeys(names, "x"), **options)
    return {problem.variable: problem for problem in problems}


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("rayservice_modles", "rayservice_models"),
        ("rayservice_nme", "rayservice_name"),
        ("raservice_models", "rayservice_models"),
        ("platform_regon", "platform_region"),
        ("platfrm_region", "platform_region"),
        ("platfrom", "platform"),
        ("network_cidr", "network_vpc_cidr"),
        ("eks_verison", "eks_version"),
    ],
)
def test_misspelt_names_are_found_with_the_nearest(name: str, guess: str) -> None:
    problem = unknown(name)[name]
    assert guess in problem.cure


def test_a_prefix_alone_is_no_likeness() -> None:
    problem = unknown("network_mtu_override")["network_mtu_override"]
    assert "role network" in problem.reason
    assert "did you mean" not in problem.cure


@pytest.mark.parametrize(
    "name",
    [
        "my_team",
        "ansible_host",
        "inventory_hostname",
        "__rayservice_x",
        "_private",
        "molecule_file",
        "region",
        "group_names",
        *sorted(KNOWN),
    ],
)
def test_a_users_own_names_and_ansibles_are_left_alone(name: str) -> None:
    assert unknown(name) == {}


def test_removed_names_say_what_to_do() -> None:
    removed = {"eks_k8s_version": ("eks_version", "0.3"), "eks_magic": ("", "0.2")}
    problems = unknown("eks_k8s_version", "eks_magic", removed=removed)
    assert problems["eks_k8s_version"].cure == "rename it to eks_version"
    assert "release 0.2" in problems["eks_magic"].reason
    assert problems["eks_magic"].cure == "delete it"


# --- types and choices -----------------------------------------------------------------------------------------------


def against(option: dict[str, Any], value: Any) -> list[Problem]:
    return list(check_options({"eks_x": value}, {"eks_x": option}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("bool", True), ("int", 3), ("float", 3), ("float", 0.5), ("str", "x"), ("str", 5), ("path", "/x")),
        *(("list", []), ("dict", {}), ("raw", object()), ("str", None)),
    ],
)
def test_right_types(kind: str, value: Any) -> None:
    assert against({"type": kind}, value) == []


@pytest.mark.parametrize(
    ("kind", "value", "cure"),
    [
        ("bool", "false", "-e '{\"eks_x\": false}'"),
        ("bool", "yes", "-e '{\"eks_x\": true}'"),
        ("bool", 1, "write true"),
        ("int", "3", "-e '{\"eks_x\": 3}'"),
        ("int", True, "write 3"),
        ("int", 2.5, "write 3"),
        ("float", "0.5", "write 0.5 without quotes"),
        ("str", 1.3, 'eks_x: "..."'),
        ("str", True, 'eks_x: "..."'),
        ("str", ["a"], 'write "text"'),
        ("list", "a,b", 'write ["a", "b"] without quotes'),
        ("list", "[g5.xlarge]", """-e '{"eks_x": ["g5.xlarge"]}'"""),
        ("dict", "{a: 1}", 'write {"a": 1} without quotes'),
        ("list", {"a": 1}, "write [one, two]"),
        ("dict", "a=b", "write {key: value} without quotes"),
        ("dict", [], "write {key: value}"),
    ],
)
def test_wrong_types(kind: str, value: Any, cure: str) -> None:
    (problem,) = against({"type": kind}, value)
    assert problem.variable == "eks_x"
    assert cure in problem.cure


def test_choices_name_the_nearest() -> None:
    option = {"type": "str", "choices": ["ON_DEMAND", "SPOT"]}
    (problem,) = against(option, "SPTO")
    assert "ON_DEMAND, SPOT; did you mean SPOT?" in problem.cure
    assert against(option, "SPOT") == []
    (problem,) = against({"type": "list", "elements": "str", "choices": ["a"]}, ["a", "b"])
    assert problem.value == "b"


def test_required() -> None:
    option = {"type": "str", "required": True, "choices": ["a", "b"], "description": ["The mode.", "More."]}
    (problem,) = check_options({}, {"eks_x": option})
    assert problem.value is ABSENT
    assert problem.cure == "set it to one of a, b: The mode"
    (problem,) = against(option, None)
    assert problem.value is None


def test_nested_options_are_checked_with_their_path() -> None:
    entry = {"type": "dict", "options": {"min": {"type": "int"}, "max": {"type": "int", "required": True}}}
    spec = {
        "type": "list",
        "elements": "dict",
        "options": {"id": {"type": "str", "aliases": ["name"]}, "replicas": entry},
    }
    found = against(spec, [{"id": "x", "replcas": {}}, {"replicas": {"min": "1"}}, "text", {"name": "y"}])
    assert [(problem.variable, problem.cure) for problem in found] == [
        ("eks_x[0].replcas", "did you mean replicas?"),
        ("eks_x[1].replicas.min", "write 1 without quotes"),
        ("eks_x[1].replicas.max", "set it"),
        ("eks_x[2]", "write {key: value} without quotes"),
    ]


def test_entries_that_a_module_takes_are_checked_by_its_documentation() -> None:
    option = {"eks_extra_node_groups": {"type": "list", "elements": "dict"}}
    group = {"name": "a", "max_siz": 3, "capacity_type": "spot", "taints": [{"value": "x"}]}
    found = {problem.variable: problem for problem in check_options({"eks_extra_node_groups": [group]}, option)}
    where = "eks_extra_node_groups[0]"
    assert found.keys() == {
        f"{where}.max_siz",
        f"{where}.max_size",
        f"{where}.capacity_type",
        f"{where}.taints[0].key",
    }
    assert found[f"{where}.max_siz"].cure == "did you mean max_size?"
    assert "SPOT" in found[f"{where}.capacity_type"].cure
