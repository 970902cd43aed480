#!/usr/bin/python
"""Reconcile all Kubernetes objects of one role in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: k8s_apply_set
short_description: Reconcile a set of Kubernetes objects in one call
description:
  - Applies every object server-side with one field manager, repairs fields that an operator does not keep, deletes
    what carries the
    set's labels and is no longer declared, and waits once, with evidence when the wait fails.
  - In check mode the API server is asked with a dry run. Objects whose namespace or CRD does not exist yet are
    predicted as created, and so are all where there is no kubeconfig yet.
  - Values of Secrets never appear in the diff.
  - The cluster is found as kubernetes.core finds it (E(K8S_AUTH_KUBECONFIG), E(K8S_AUTH_CONTEXT), E(K8S_AUTH_HOST),
    E(KUBECONFIG)).
options:
  objects:
    description: The objects that should exist.
    type: list
    elements: dict
    default: []
  src:
    description: >-
      A JSON file with a list of further objects (see M(rayplane.platform.kustomize_build) and
      M(rayplane.platform.helm_build)).
    type: path
  labels:
    description: >-
      Labels of every object of the set. C(app.kubernetes.io/part-of), C(app.kubernetes.io/component) and
      C(app.kubernetes.io/instance)
      also tell which objects are the set's own when pruning.
    type: dict
    required: true
  state:
    description: With V(absent) the declared objects and those of O(prune_kinds) with the set's labels are deleted and
      waited for.
    type: str
    choices: [present, absent]
    default: present
  adopt:
    description: Whether objects that exist without our part-of label may be taken over; otherwise they stop the run
      before any change.
    type: bool
    default: true
  adopt_hint:
    description: What to tell about such objects.
    type: str
    default: ""
  keep_crds:
    description: Whether CRDs stay when the state is V(absent). One with objects left always stays.
    type: bool
    default: false
  gone:
    description: >-
      Objects (C(api_version), C(kind), C(namespace), C(selector)) that have to be gone before O(state=absent) is
      reached.
    type: list
    elements: dict
    default: []
  used_by:
    description: >-
      Kinds (C(api_version), C(kind), C(hint)) whose objects need the set for their own end. While there are some,
      O(state=absent) fails before anything is deleted, and tells C(hint).
    type: list
    elements: dict
    default: []
  align:
    description: >-
      Rules with C(api_version), C(kind), C(namespace), C(name) or C(selector), C(where) (fields that the objects have),
      and C(merge): fields of derived objects to be kept. Lists of entries with a C(name) or C(groupName) are merged by
      it.
    type: list
    elements: dict
    default: []
  prune_kinds:
    description: Kinds (C(api_version), C(kind)) among which undeclared objects with the set's labels are deleted.
    type: list
    elements: dict
    default: []
  protected:
    description: Names that are never deleted.
    type: list
    elements: str
    default: []
  wait_for:
    description: >-
      Objects (C(api_version), C(kind), C(namespace), C(name), optional C(condition)) to wait for. Deployments,
      DaemonSets (ready where no node wants them), StatefulSets, CRDs, RayServices, and Ingresses and
      Services with a load balancer are known,
      other kinds are ready by their condition (Ready, where none is named).
    type: list
    elements: dict
    default: []
  wait_timeout:
    description: Seconds to wait, in all.
    type: int
    default: 300
  evidence:
    description: The C(namespace) and pod C(selector) whose pods, logs and events are shown when the wait fails.
    type: dict
    default: {}
  kubeconfig:
    description: A kubeconfig other than the environment's.
    type: path
  context:
    description: A context other than the current one.
    type: str
  field_manager:
    description: The name under which fields are owned.
    type: str
    default: rayplane
author: rayplane contributors (@rayplane)
attributes:
  check_mode:
    support: full
    description: Predicts with the API server's dry run.
  diff_mode:
    support: full
    description: Shows the declared part of each object that changes.
"""

EXAMPLES = r"""
- name: Apply the role's objects
  rayplane.platform.k8s_apply_set:
    objects: "{{ __rayservice_objects }}"
    labels:
      app.kubernetes.io/part-of: rayplane
      app.kubernetes.io/component: rayservice
      app.kubernetes.io/instance: rayplane
    prune_kinds:
      - {api_version: ray.io/v1, kind: RayService}
    wait_for:
      - {api_version: ray.io/v1, kind: RayService, namespace: rayplane, name: rayplane}
"""

RETURN = r"""
created:
  description: Objects that did not exist.
  type: list
  returned: always
  sample: ["Namespace rayplane"]
updated:
  description: Objects of which a declared field differed.
  type: list
  returned: always
aligned:
  description: Derived objects that were repaired, and failed applications of Serve that were tried again.
  type: list
  returned: always
pruned:
  description: Objects that were deleted because they are no longer declared.
  type: list
  returned: always
unchanged:
  description: Objects that were as declared.
  type: list
  returned: always
waited_s:
  description: Seconds spent waiting.
  type: float
  returned: always
"""

import json
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import (
    Cluster,
    ClusterToCome,
    KubeError,
    NoKubeconfigError,
    connection_from_environment,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.apply import ApplyError, ApplySet


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(DOCUMENTATION),
        supports_check_mode=True,
    )
    given = module.params
    waited = 0.0
    try:
        objects = list(given["objects"])
        if given["src"]:
            objects += json.loads(Path(given["src"]).read_text(encoding="utf-8"))
        try:
            cluster = Cluster(connection_from_environment(given["kubeconfig"], given["context"]))
        except NoKubeconfigError:
            if not module.check_mode:
                raise
            # An earlier stage would write it, and with it comes the cluster.
            cluster = ClusterToCome()
        work = ApplySet(cluster, given["labels"], given["field_manager"], dry_run=module.check_mode)
        if given["state"] == "present":
            work.apply(objects, adopt=given["adopt"], hint=given["adopt_hint"])
            work.align(given["align"])
            work.prune(given["prune_kinds"], keep=objects, protected=given["protected"])
            work.retry(given["wait_for"])
            if not module.check_mode:
                waited = work.wait(given["wait_for"], given["wait_timeout"], given["evidence"])
        else:
            work.refuse_while_used(given["prune_kinds"], given["used_by"])
            gone = work.remove(objects, given["prune_kinds"], given["protected"], keep_crds=given["keep_crds"])
            if not module.check_mode:
                waited = work.wait(
                    [*gone, *({**target, "gone": True} for target in given["gone"])],
                    given["wait_timeout"],
                    given["evidence"],
                )
        outcome = work.outcome
        for warning in cluster.warnings:
            module.warn(warning)
        module.exit_json(
            changed=outcome.changed,
            created=outcome.created,
            updated=outcome.updated,
            aligned=outcome.aligned,
            pruned=outcome.pruned,
            unchanged=outcome.unchanged,
            waited_s=round(waited, 1),
            diff=outcome.diff,
        )
    except (ApplyError, KubeError, OSError, ValueError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
