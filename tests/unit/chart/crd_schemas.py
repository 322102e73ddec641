"""JSON schemas of the custom resources that the chart makes.

The fields it uses, with the types, bounds and words of the published definitions. Keys that are not listed are refused,
which is stricter than a cluster.

| kind | published in | at commit |
|---|---|---|
| LeaderWorkerSet v1 | kubernetes-sigs/lws, config/crd/bases | 060ab4da17ee (2026-08-21) |
| ScaledObject v1alpha1 | kedacore/keda, config/crd/bases | 8b4f083ca8c8 (2026-08-20) |
| HTTPRoute v1 | kubernetes-sigs/gateway-api, config/crd/standard | 4564255ac2c3 (2026-08-21) |
| InferencePool v1 | kubernetes-sigs/gateway-api-inference-extension, config/crd/bases | 84436a96b9e6 (2026-08-18) |
| PodMonitor, PrometheusRule v1 | prometheus-operator/prometheus-operator, example | 6adcebc5076c (2026-08-08) |
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
EITHER: Schema = {"type": ["integer", "string"]}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
PROMETHEUS_DURATION: Schema = {"type": "string", "pattern": r"^(0|([0-9]+(y|w|d|h|m|s|ms))+)$"}
GATEWAY_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
GROUP: Schema = {"type": "string", "maxLength": 253, "pattern": r"^$|^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
KIND: Schema = {"type": "string", "maxLength": 63, "pattern": r"^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"}
NAMESPACE: Schema = {"type": "string", "maxLength": 63, "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 253}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def many(items: Schema, least: int = 0, most: int = 1000) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def obj(required: str = "", **properties: Schema) -> Schema:
    made = {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}
    return made


def resource(spec: Schema) -> Schema:
    return obj("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata={"type": "object"}, spec=spec)


_SELECTOR = obj(
    matchLabels=TEXTS,
    matchExpressions=many(
        obj("key operator", key=TEXT, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"), values=many(TEXT))
    ),
)
_POLICIES = many(obj("periodSeconds type value", periodSeconds=COUNT, type=TEXT, value=COUNT))

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): resource(
        obj(
            "leaderWorkerTemplate",
            replicas={"type": "integer", "minimum": 0, "maximum": 1000000},
            startupPolicy=one_of("LeaderCreated", "LeaderReady"),
            rolloutStrategy=obj(
                "type",
                type=one_of("RollingUpdate"),
                rollingUpdateConfiguration=obj(maxSurge=EITHER, maxUnavailable=EITHER),
            ),
            leaderWorkerTemplate=obj(
                "workerTemplate",
                size=COUNT,
                restartPolicy=one_of("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
                # Both are pod templates, which the tests validate as pods.
                leaderTemplate={"type": "object"},
                workerTemplate={"type": "object"},
            ),
        )
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): resource(
        obj(
            "scaleTargetRef triggers",
            scaleTargetRef=obj("name", apiVersion=TEXT, kind=TEXT, name={"type": "string", "minLength": 1}),
            minReplicaCount={"type": "integer", "minimum": 0},
            maxReplicaCount={"type": "integer", "minimum": 1},
            cooldownPeriod={"type": "integer", "minimum": 0},
            advanced=obj(
                horizontalPodAutoscalerConfig=obj(
                    behavior=obj(scaleDown=obj(stabilizationWindowSeconds=COUNT, policies=_POLICIES))
                )
            ),
            triggers=many(
                obj("metadata type", type={"type": "string", "minLength": 1}, metricType=TEXT, metadata=TEXTS), least=1
            ),
        )
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): resource(
        obj(
            parentRefs=many(
                obj("name", group=GROUP, kind=KIND, name=NAME, namespace=NAMESPACE, port=PORT, sectionName=NAME),
                most=32,
            ),
            hostnames=many(
                {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 253,
                    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
                },
                most=16,
            ),
            rules=many(
                obj(
                    matches=many(
                        obj(
                            path=obj(
                                type=one_of("Exact", "PathPrefix", "RegularExpression"),
                                value={"type": "string", "maxLength": 1024},
                            )
                        ),
                        most=64,
                    ),
                    timeouts=obj(request=GATEWAY_DURATION, backendRequest=GATEWAY_DURATION),
                    backendRefs=many(
                        obj("name", group=GROUP, kind=KIND, name=NAME, namespace=NAMESPACE, port=PORT), most=16
                    ),
                ),
                least=1,
                most=16,
            ),
        )
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): resource(
        obj(
            "selector targetPorts",
            selector=obj("matchLabels", matchLabels={**TEXTS, "minProperties": 1, "maxProperties": 64}),
            targetPorts=many(obj("number", number=PORT), least=1, most=8),
            endpointPickerRef=obj(
                "name",
                group=GROUP,
                kind=KIND,
                name=NAME,
                port=obj("number", number=PORT),
                failureMode=one_of("FailOpen", "FailClose"),
            ),
        )
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): resource(
        obj(
            "selector",
            selector=_SELECTOR,
            podMetricsEndpoints=many(
                obj(
                    port=TEXT,
                    path=TEXT,
                    interval=PROMETHEUS_DURATION,
                    honorLabels=FLAG,
                    authorization=obj(type=TEXT, credentials=obj("key", key=TEXT, name=TEXT)),
                    relabelings=many(obj(sourceLabels=many(TEXT), targetLabel=TEXT, replacement=TEXT, regex=TEXT)),
                )
            ),
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): resource(
        obj(
            groups=many(
                obj(
                    "name",
                    name={"type": "string", "minLength": 1},
                    interval=PROMETHEUS_DURATION,
                    rules=many(
                        {
                            **obj(
                                "expr",
                                alert=TEXT,
                                record=TEXT,
                                expr=EITHER,
                                labels=TEXTS,
                                annotations=TEXTS,
                                **{"for": PROMETHEUS_DURATION, "keep_firing_for": PROMETHEUS_DURATION},
                            ),
                            # Only one of the two must be set.
                            "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                        }
                    ),
                )
            )
        )
    ),
}


def validate(found: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, and KeyError for a kind that has no schema here."""
    jsonschema.Draft202012Validator(SCHEMAS[found["apiVersion"], found["kind"]]).validate(found)
