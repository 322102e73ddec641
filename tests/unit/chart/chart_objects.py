"""Whether a Kubernetes version takes an object."""

from __future__ import annotations

import crd_schemas
import kubernetes_validate
from chart_render import FOREIGN, Object


def validate(found: Object, version: str) -> None:
    """Raises kubernetes_validate.ValidationError, or jsonschema's for a custom resource."""
    if found["apiVersion"] not in FOREIGN:
        kubernetes_validate.validate(found, version, strict=True)
        return
    crd_schemas.validate(found)
    if found["kind"] == "LeaderWorkerSet":
        for which in ("leaderTemplate", "workerTemplate"):
            pod = {"apiVersion": "v1", "kind": "Pod", **found["spec"]["leaderWorkerTemplate"][which]}
            kubernetes_validate.validate(pod, version, strict=True)
