"""The part of JobSet's schema that launch/gke uses, written down from its API, v1alpha2 of JobSet 0.10.

https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2. Jobs within it are Kubernetes', and checked as such.
"""


def _object(required=(), **properties):
  return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT, "uniqueItems": True}
_PAIRS = {"type": "object", "additionalProperties": _TEXT}
_NUMBER = {"type": "integer", "minimum": 0}

_RULE = _object(
  ("name", "action"),
  name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
  action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
  onJobFailureReasons={
    "type": "array",
    "uniqueItems": True,
    "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]},
  },
  onJobFailureMessagePatterns=_TEXTS,
  targetReplicatedJobs=_TEXTS,
)

SCHEMA = _object(
  ("apiVersion", "kind", "metadata", "spec"),
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=_object(("name",), name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}, labels=_PAIRS, annotations=_PAIRS),
  spec=_object(
    ("replicatedJobs",),
    failurePolicy=_object(
      (), maxRestarts=_NUMBER, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}, rules={"type": "array", "items": _RULE}
    ),
    replicatedJobs={
      "type": "array",
      "minItems": 1,
      "items": _object(("name", "template"), name=_TEXT, replicas=_NUMBER, template=_object(("spec",), spec={"type": "object"})),
    },
  ),
)
