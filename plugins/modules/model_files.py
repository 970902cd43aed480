#!/usr/bin/python
"""Bring the files of all models into the models bucket."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_files
short_description: Bring the files of all models into a bucket
description:
  - Each model's files go below C(models/<id>/<content digest>/); a manifest with source, revision, licence and
    checksums is written last.
  - A rerun reads no file whose size and modification time it knows and uploads nothing that is in the bucket.
  - In check mode nothing is downloaded or uploaded; the bucket need not exist.
options:
  models:
    description: >-
      The models: C(id), C(source) (a folder, an s3:// address, or a hub id), optional C(revision), C(license),
      C(checksum).
    type: list
    elements: dict
    required: true
  bucket:
    description: Name of the bucket.
    type: str
    required: true
  prefix:
    description: What comes before the models' ids.
    type: str
    default: models
  cache_dir:
    description: Folder for remembered checksums and passing downloads.
    type: path
    required: true
  hub_mode:
    description: With V(direct) models of a hub stay there, and the pods fetch them.
    type: str
    choices: [copy, direct]
    default: copy
  ignore:
    description: Patterns of file names that are not needed for serving.
    type: list
    elements: str
    default: []
  keep_versions:
    description: Versions of each model to keep; 0 keeps all.
    type: int
    default: 0
  parallel:
    description: Files, and parts of a file, that are transferred at once.
    type: int
    default: 4
  addressing_style:
    description: How the bucket is addressed.
    type: str
    choices: [auto, path, virtual]
    default: auto
  state:
    description: With V(absent) everything below the models' prefixes is deleted.
    type: str
    choices: [present, absent]
    default: present
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Predicts uploads from names, sizes and checksums.
  diff_mode:
    support: full
    description: Lists the files to upload and the versions to delete.
"""

EXAMPLES = r"""
- name: Bring the models to the bucket
  rayplane.platform.model_files:
    models:
      - {id: qwen-0-5b, source: Qwen/Qwen2.5-0.5B-Instruct, revision: main}
    bucket: "{{ platform_models_bucket }}"
    cache_dir: /var/cache/rayplane/models
"""

RETURN = r"""
locations:
  description: Where each model's pods load it from, by id.
  type: dict
  returned: success
  sample: {"qwen-0-5b": "s3://models/models/qwen-0-5b/0123456789abcdef"}
models:
  description: For each model its digest, number of files, bytes, uploaded files, pruned versions and seconds.
  type: list
  returned: success
"""

import importlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.serving.model_sync import (
    HUB_ID,
    Bucket,
    ModelError,
    Result,
    Syncer,
)


def hub_module() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelError(
            "a model comes from a hub, and the Python package huggingface_hub is not installed: "
            "make bootstrap installs it; or name a folder or an s3:// address as source"
        ) from error


def is_hub(model: dict[str, Any]) -> bool:
    source = str(model["source"])
    return bool(HUB_ID.fullmatch(source)) and not Path(source).is_dir()


def connect(module: AnsibleModule) -> Bucket:
    import boto3  # noqa: PLC0415 - half a second that a failed argument check need not pay
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    given = module.params
    config = Config(
        s3={"addressing_style": given["addressing_style"]},
        retries={"mode": "standard", "max_attempts": 5},
        max_pool_connections=max(10, given["parallel"] ** 2),
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    client = boto3.client("s3", region_name=region, config=config)
    part = 32 * 1024 * 1024
    transfer = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_concurrency=given["parallel"])
    return Bucket(client, given["bucket"], transfer)


def present(module: AnsibleModule) -> None:
    given = module.params
    direct = [model for model in given["models"] if given["hub_mode"] == "direct" and is_hub(model)]
    locations = {model["id"]: str(model["source"]) for model in direct}
    results: list[Result] = []
    if len(direct) < len(given["models"]):
        syncer = Syncer(
            connect(module),
            Path(given["cache_dir"]),
            prefix=given["prefix"],
            ignore=given["ignore"],
            keep_versions=given["keep_versions"],
            hub=hub_module,
            dry_run=module.check_mode,
            workers=given["parallel"],
        )
        results = [syncer.sync(model) for model in given["models"] if model["id"] not in locations]
    locations |= {result.id: result.location for result in results}
    changed = [result for result in results if result.changed]
    diff = [
        {
            "before_header": f"{result.id} (bucket)",
            "after_header": f"{result.id} ({result.location})",
            "before": "".join(f"version {digest}\n" for digest in result.pruned),
            "after": "".join(f"{name}\n" for name in result.uploaded),
        }
        for result in changed
    ]
    module.exit_json(
        changed=bool(changed), locations=locations, models=[asdict(result) for result in results], diff=diff
    )


def absent(module: AnsibleModule) -> None:
    given = module.params
    bucket = connect(module)
    gone: list[str] = []
    if bucket.exists():
        for model in given["models"]:
            root = f"{given['prefix']}/{model['id']}/"
            gone += [root + name for name in bucket.sizes(root)]
    if not module.check_mode:
        bucket.delete(gone)
    module.exit_json(changed=bool(gone), deleted=gone)


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module)
    except ModelError as error:
        module.fail_json(msg=str(error))
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
            module.fail_json(msg=f"S3, bucket {module.params['bucket']}: {error}")
        raise


if __name__ == "__main__":
    main()
