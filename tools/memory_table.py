"""Write the memory arithmetic of the inventories' models into docs/memory.md.

python tools/memory_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.rayplane.platform.plugins.module_utils.serving.memory import GIB, need, shape_of
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.memory import model_gpu

DOCUMENT = ROOT / "docs/memory.md"
INVENTORIES = ("dev", "staging", "prod")
_HEAD = (
    *("inventory", "model", "GPU", "parameters", "weights", "KV cache of one sequence", "activations", "CUDA graphs"),
    *("runtime", "sum", "vLLM may use", "sequences of full length"),
)


def _variables(inventory: str) -> dict[str, Any]:
    """What an inventory's files say, and the node groups of the role eks filled with it."""
    values: dict[str, Any] = {"platform": "aws"}
    for file in sorted((ROOT / "inventories" / inventory / "group_vars/all").glob("*.yml")):
        values |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return {**values, "eks_node_groups": [{"name": "gpu", "instance_types": values["eks_gpu_instance_types"]}]}


def table() -> str:
    """The table in Markdown, sizes in GiB."""
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for inventory in INVENTORIES:
        values = _variables(inventory)
        for model in values["rayservice_models"]:
            shape, gpu = shape_of(model["source"]), model_gpu(values, model)
            if shape is None or gpu is None:
                raise SystemExit(f"{inventory}: nothing is known of {model['source']} or of its GPU")
            found = need(shape, model["engine"], gpu)
            sizes = (found.weights, found.cache, found.activations, found.graphs, found.runtime, found.total)
            share = f"{gpu.memory} x {found.budget / GIB / gpu.memory:.2f} = {found.budget / GIB:.2f}"
            rows.append(
                (
                    *(inventory, model["id"], gpu.title, f"{shape.parameters / 1e9:.3f} billion"),
                    f"{sizes[0] / GIB:.2f}",
                    f"{sizes[1] / GIB:.2f} ({found.length:,} tokens)",
                    *(f"{size / GIB:.2f}" for size in sizes[2:]),
                    share,
                    f"{found.sequences:.1f}",
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Put the table between the document's marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    marks = r"(?s)(<!-- table -->\n\n).*(\n\n<!-- end of table -->)"
    DOCUMENT.write_text(re.sub(marks, lambda match: f"{match[1]}{table()}{match[2]}", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
