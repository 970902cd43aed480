"""Write the variable tables of the roles' READMEs from argument specs and defaults, or check that they are up to date.

    python tools/spec_docs.py [role ...]    write, for all roles or those named
    python tools/spec_docs.py --check       write nothing, exit 1 and name the READMEs that are out of date

Only what stands between the markers is touched: people write the text around it. A role without a README gets one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

BEGIN, END = "<!-- variables -->", "<!-- end of variables -->"
LONGEST_DEFAULT = 80
PROJECT = Path(__file__).resolve().parents[1]


def table(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A Markdown table of a spec's options with the role's defaults, nested options below their parent."""
    rows = ["| Variable | Type | Default | Description |", "| --- | --- | --- | --- |"]
    with_defaults = {name: {**option, "default": defaults.get(name)} for name, option in options.items()}
    rows += [f"| {' | '.join(cells)} |" for cells in _rows(with_defaults, "")]
    return "\n".join(rows)


def _rows(options: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, option in options.items():
        kind = str(option.get("type", "str"))
        elements = f" of {option['elements']}" if option.get("elements") else ""
        yield f"`{prefix}{name}`", f"{kind}{elements}", _default(option), _description(option)
        if nested := option.get("options"):
            yield from _rows(nested, f"{prefix}{name}{'[]' if kind == 'list' else ''}.")


def _default(option: Mapping[str, Any]) -> str:
    if option.get("required"):
        return "required"
    if option.get("default") is None:
        return ""
    value = option["default"]
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) <= LONGEST_DEFAULT else "see `defaults/main.yml`"


def _description(option: Mapping[str, Any]) -> str:
    text = option.get("description", "")
    sentences = [text] if isinstance(text, str) else list(text)
    if choices := option.get("choices"):
        sentences.append(f"One of {', '.join(f'`{choice}`' for choice in choices)}.")
    return _cell(" ".join(str(sentence).strip() for sentence in sentences))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def section(body: str) -> str:
    """What stands between the markers, markers included."""
    return f"{BEGIN}\n\n{body}\n\n{END}"


def document(old: str, role: str, spec: Mapping[str, Any], body: str) -> str:
    """The README with its section replaced; a README that has none gets it at its end, and an absent one is begun."""
    if not old.strip():
        points = spec.get("description", [])
        points = [points] if isinstance(points, str) else points
        old = "\n".join(
            [
                f"# {role}",
                "",
                f"{str(spec.get('short_description', '')).rstrip('.')}.",
                "",
                *(f"- {_cell(str(point))}" for point in points),
                "",
            ]
        )
    if BEGIN in old and END in old:
        before, rest = old.split(BEGIN, maxsplit=1)
        return before + body + rest.split(END, maxsplit=1)[1]
    return f"{old.rstrip()}\n\n## Variables\n\n{body}\n"


def readmes(project: Path) -> Iterator[tuple[Path, str]]:
    """Each role's README and what it has to hold."""
    for file in sorted((project / "roles").glob("*/meta/argument_specs.yml")):
        folder = file.parents[1]
        spec = next(iter(yaml.safe_load(file.read_text(encoding="utf-8"))["argument_specs"].values()))
        defaults_file = folder / "defaults" / "main.yml"
        defaults = yaml.safe_load(defaults_file.read_text(encoding="utf-8")) if defaults_file.is_file() else {}
        body = table(spec.get("options") or {}, defaults)
        readme = folder / "README.md"
        old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        yield readme, document(old, folder.name, spec, section(body))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("roles", nargs="*", help="roles to look at; all without any")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a README is out of date")
    parser.add_argument("--project", type=Path, default=PROJECT, help="the project's folder")
    options = parser.parse_args(arguments)
    wanted = [pair for pair in readmes(options.project) if not options.roles or pair[0].parent.name in options.roles]
    stale = [(file, text) for file, text in wanted if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file, text in stale:
        name = file.relative_to(options.project)
        if options.check:
            print(f"{name} is out of date: run python tools/spec_docs.py")
        else:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
