"""Raw answers of AWS, compared with the service models of botocore: names, types, enumerations, lists, timestamps.

boto3 itself is lenient: it drops unknown members and takes most types as they come. Other clients are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

Element = ElementTree.Element
ISO_8601 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "structure": dict,
    "map": dict,
    "list": list,
    "boolean": bool,
    "integer": int,
    "long": int,
    "float": (int, float),
    "double": (int, float),
    # Seconds since 1970, unless the model names another format.
    "timestamp": (int, float),
}


class Recorder:
    """Looks at every answer that a client gets: ``operations`` it called, ``faults`` found."""

    def __init__(self, client: Any) -> None:
        self.operations: set[str] = set()
        self.faults: list[str] = []
        client.meta.events.register("before-parse", self.look)

    def look(self, operation_model: OperationModel, response_dict: dict[str, Any], **_: Any) -> None:
        """Compare one answer, before it is parsed."""
        self.operations.add(operation_model.name)
        body, shape = response_dict["body"], operation_model.output_shape
        if response_dict["status_code"] >= 300 or shape is None:
            return
        if operation_model.service_model.metadata["protocol"].endswith("json"):
            found = json_faults(shape, json.loads(body or b"{}"), operation_model.name)
        else:
            root = ElementTree.fromstring(body)
            # Protocol elements that stand in no model.
            for child in [one for one in root if _local(one) in ("requestId", "return", "ResponseMetadata")]:
                root.remove(child)
            found = xml_faults(shape, root, operation_model.name)
        self.faults += found


def json_faults(shape: Shape, value: Any, place: str) -> Iterator[str]:
    """Return what is wrong with a JSON value."""
    kind = JSON_TYPES.get(shape.type_name, str)
    if not isinstance(value, kind) or (isinstance(value, bool) and shape.type_name != "boolean"):
        yield f"{place}: {shape.type_name} expected, not {value!r}"
    elif isinstance(shape, StructureShape):
        names = {str(member.serialization.get("name", name)): member for name, member in shape.members.items()}
        for key, one in value.items():
            if key not in names:
                yield f"{place}.{key}: not in the model"
            else:
                yield from json_faults(names[key], one, f"{place}.{key}")
        yield from (f"{place}.{name}: missing" for name in shape.required_members if name not in value)
    elif isinstance(shape, ListShape):
        for one in value:
            yield from json_faults(shape.member, one, f"{place}[]")
    elif isinstance(shape, MapShape):
        for one in value.values():
            yield from json_faults(shape.value, one, f"{place}{{}}")
    else:
        yield from _not_enumerated(shape, value, place)


def xml_faults(shape: Shape, element: Element, place: str) -> Iterator[str]:
    """Return what is wrong with an element of EC2's protocol."""
    text = element.text or ""
    if isinstance(shape, StructureShape):
        names = {str(member.serialization.get("name", name)): member for name, member in shape.members.items()}
        seen: set[str] = set()
        for child in element:
            key = _local(child)
            if key not in names:
                yield f"{place}.{key}: not in the model"
            elif key in seen:
                yield f"{place}.{key}: twice"
            else:
                yield from xml_faults(names[key], child, f"{place}.{key}")
            seen.add(key)
        if text.strip():
            yield f"{place}: structure expected, not {text.strip()!r}"
    elif isinstance(shape, ListShape):
        item = shape.member.serialization.get("name", "member")
        for child in element:
            if _local(child) != item:
                yield f"{place}: {item} expected in the list, not {_local(child)}"
            else:
                yield from xml_faults(shape.member, child, f"{place}[]")
        if text.strip():
            yield f"{place}: list expected, not {text.strip()!r}"
    elif len(element):
        yield f"{place}: {shape.type_name} expected, not an element with children"
    elif not _fits(shape.type_name, text):
        yield f"{place}: {shape.type_name} expected, not {text!r}"
    else:
        yield from _not_enumerated(shape, text, place)


def _fits(kind: str, text: str) -> bool:
    if kind == "boolean":
        return text in ("true", "false")
    if kind in ("integer", "long"):
        return text.lstrip("-").isdigit()
    return kind != "timestamp" or bool(ISO_8601.fullmatch(text))


def _not_enumerated(shape: Shape, value: Any, place: str) -> Iterator[str]:
    # EC2 itself answers `available` where its model has `Available`.
    allowed = getattr(shape, "enum", ())
    if allowed and value.lower() not in [one.lower() for one in allowed]:
        yield f"{place}: {value!r} is none of {', '.join(allowed)}"


def _local(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]
