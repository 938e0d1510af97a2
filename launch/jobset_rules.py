"""Checks the rules of Kubernetes and the JobSet controller for the fields that moejax.launch.jobset writes.

A JobSet can be rejected by the API server (a field of the wrong type), by the JobSet webhook (a name that is too long),
and again by the API server when the JobSet controller creates Jobs. In the last case, there is no error message: the
JobSet exists, but its Jobs are never created. Therefore, all rules are checked before anything is submitted.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.launch.hosts import PRODUCTS

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 63
POD_SUFFIX = "-abcde"
"""A suffix as long as the one that Kubernetes appends to the names of pods."""
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
FAILURE_REASONS = (
  "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy",
)  # fmt: skip
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
EXIT_CODES = range(1, 256)

TEXTS = {"*": str}
"""An object with any keys and string values."""
REFERENCE = {"fieldRef!": {"fieldPath!": str}}
CONTAINER = {
  "name!": str, "image!": str, "command!": [str], "ports": [{"containerPort!": int}],
  "env": [{"name!": str, "value": str, "valueFrom": REFERENCE}],
  "resources!": {"requests!": {"*": int}, "limits!": {"*": int}},
  "volumeMounts": [{"name!": str, "mountPath!": str}],
}  # fmt: skip
VOLUME = {"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": {"medium": str}}
POD = {
  "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": TEXTS, "containers!": [CONTAINER],
  "volumes": [VOLUME],
  "tolerations": [{"key!": str, "operator!": str, "value": str, "effect": str}],
}  # fmt: skip
JOB = {
  "parallelism!": int, "completions!": int, "completionMode!": str, "backoffLimit!": int,
  "podFailurePolicy": {"rules!": [{
    "action!": str,
    "onExitCodes": {"containerName": str, "operator!": str, "values!": [int]},
    "onPodConditions": [{"type!": str, "status!": str}],
  }]},
  "template!": {"spec!": POD},
}  # fmt: skip
JOBSET = {
  "apiVersion!": str, "kind!": str,
  "metadata!": {"name!": str, "annotations": TEXTS, "labels": TEXTS},
  "spec!": {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
    "successPolicy": {"operator!": str},
    "failurePolicy": {
      "maxRestarts": int, "restartStrategy": str,
      "rules": [{
        "name!": str, "action!": str, "onJobFailureReasons": [str], "onJobFailureMessagePatterns": [str],
      }],
    },
    "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
  },
}  # fmt: skip
"""Types of the fields. Fields with ! are required."""


def problems(jobset: Mapping[str, Any]) -> list[str]:
  """Lists the violations of rules in a JobSet, each with field, value and limit."""
  wrong = list(_types(jobset, JOBSET, ""))
  return wrong or [problem for rule in (_names, _failure_policy, _jobs) for problem in rule(jobset)]


def _types(value: Any, schema: Any, path: str) -> Iterator[str]:
  """Yields fields of the wrong type, unknown fields and missing fields."""
  if isinstance(schema, list):
    if not isinstance(value, list):
      yield f"{path}={value!r} is not a list"
      return
    for i, item in enumerate(value):
      yield from _types(item, schema[0], f"{path}[{i}]")
  elif isinstance(schema, dict):
    if not isinstance(value, Mapping):
      yield f"{path}={value!r} is not an object"
      return
    of_key = {key.rstrip("!"): of for key, of in schema.items()}
    for key, item in value.items():
      if key in of_key or "*" in of_key:
        yield from _types(item, of_key.get(key, of_key.get("*")), f"{path}.{key}")
      else:
        yield f"{path}.{key} is unknown; known are {', '.join(of_key)}"
    yield from (f"{path}.{key[:-1]} is missing" for key in schema if key.endswith("!") and key[:-1] not in value)
  elif not isinstance(value, schema) or (schema is int and isinstance(value, bool)):
    yield f"{path}={value!r} is not of type {schema.__name__}"


def _names(jobset: Mapping[str, Any]) -> Iterator[str]:
  """Checks names. With the appended indices, names of pods must be DNS labels."""
  name = jobset["metadata"]["name"]
  if not DNS_LABEL.fullmatch(name):
    yield f".metadata.name={name!r} is not a DNS label (lower-case letters, digits, '-'; first a letter); set --name"
  for job in jobset["spec"]["replicatedJobs"]:
    last = f"-{job['name']}-{job.get('replicas', 1) - 1}-{job['template']['spec']['completions'] - 1}{POD_SUFFIX}"
    if not DNS_LABEL.fullmatch(job["name"]):
      yield f".spec.replicatedJobs.name={job['name']!r} is not a DNS label"
    if len(name + last) > LONGEST_NAME:
      limit = LONGEST_NAME - len(last)
      yield f".metadata.name={name!r} has {len(name)} characters; pods' names allow {limit}; set --name"
  names = [job["name"] for job in jobset["spec"]["replicatedJobs"]]
  if len(set(names)) < len(names):
    yield f".spec.replicatedJobs: names must differ, but are {', '.join(names)}"


def _failure_policy(jobset: Mapping[str, Any]) -> Iterator[str]:
  policy = jobset["spec"].get("failurePolicy", {})
  where = ".spec.failurePolicy"
  if policy.get("maxRestarts", 0) < 0:
    yield f"{where}.maxRestarts={policy['maxRestarts']} must not be negative"
  names = [rule["name"] for rule in policy.get("rules", [])]
  if len(set(names)) < len(names):
    yield f"{where}.rules: names must differ, but are {', '.join(names)}"
  for rule in policy.get("rules", []):
    if not RULE_NAME.fullmatch(rule["name"]) or len(rule["name"]) > 128:
      yield f"{where}.rules.name={rule['name']!r} must have 1 to 128 letters, digits and _ , : and start with a letter"
    if rule["action"] not in ACTIONS:
      yield f"{where}.rules.action={rule['action']!r} is not one of {', '.join(ACTIONS)}"
    for given in rule.get("onJobFailureReasons", []):
      if given not in FAILURE_REASONS:
        yield f"{where}.rules.onJobFailureReasons: {given!r} is not one of {', '.join(FAILURE_REASONS)}"
      has_policy = any("podFailurePolicy" in job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"])
      if given == "PodFailurePolicy" and not has_policy:
        yield f"{where}.rules: no Job has a podFailurePolicy, so that the reason {given!r} never comes"
  operator = jobset["spec"].get("successPolicy", {}).get("operator", "All")
  if operator != "All":
    yield f".spec.successPolicy.operator={operator!r}: the processes of all slices are one program; use All"


def _jobs(jobset: Mapping[str, Any]) -> Iterator[str]:
  for i, replicated in enumerate(jobset["spec"]["replicatedJobs"]):
    where = f".spec.replicatedJobs[{i}]"
    job = replicated["template"]["spec"]
    if replicated.get("replicas", 1) < 1:
      yield f"{where}.replicas={replicated['replicas']} must be 1 or more"
    if not 1 <= job["completions"] == job["parallelism"]:
      yield (
        f"{where}: completions={job['completions']} and parallelism={job['parallelism']} must both be the number of "
        "hosts, all of which run at once"
      )
    if job["completionMode"] != "Indexed":
      yield f"{where}.completionMode={job['completionMode']!r} must be Indexed: the index is the process's number"
    if job["backoffLimit"] != 0:
      yield f"{where}.backoffLimit={job['backoffLimit']} must be 0: one process alone cannot join the others again"
    yield from _pod(job["template"]["spec"], f"{where}.template.spec")
    yield from _pod_failure_policy(job, where)
    yield from _tpu(job, f"{where}.template.spec")


def _pod_failure_policy(job: Mapping[str, Any], where: str) -> Iterator[str]:
  pod = job["template"]["spec"]
  rules = job.get("podFailurePolicy", {}).get("rules", [])
  if rules and pod.get("restartPolicy") != "Never":  # the JobSet webhook makes OnFailure of none
    yield f"{where}: podFailurePolicy needs restartPolicy=Never, not {pod.get('restartPolicy')!r}; no Job would be made"
  if len(rules) > 20:
    yield f"{where}.podFailurePolicy has {len(rules)} rules; 20 are allowed"
  names = [container["name"] for container in pod["containers"]]
  for rule in rules:
    if rule["action"] not in ("FailJob", "Ignore", "Count"):
      yield f"{where}.podFailurePolicy: action={rule['action']!r} is not one of FailJob, Ignore, Count"
    if ("onExitCodes" in rule) == ("onPodConditions" in rule):
      yield f"{where}.podFailurePolicy: a rule has either onExitCodes or onPodConditions"
    codes = rule.get("onExitCodes", {"operator": "In", "values": [1]})
    if codes["operator"] not in ("In", "NotIn"):
      yield f"{where}.podFailurePolicy: operator={codes['operator']!r} is not In or NotIn"
    if "containerName" in codes and codes["containerName"] not in names:
      yield f"{where}.podFailurePolicy: containerName={codes['containerName']!r} is not one of {', '.join(names)}"
    values = codes["values"]
    if list(values) != sorted(set(values)) or not values or any(code not in EXIT_CODES for code in values):
      yield f"{where}.podFailurePolicy: values={values} are not different exit codes from 1 to 255 in order"


def _pod(pod: Mapping[str, Any], where: str) -> Iterator[str]:
  if not pod["containers"]:
    yield f"{where}.containers is empty"
  if pod.get("restartPolicy") not in ("Never", "OnFailure"):
    yield f"{where}.restartPolicy={pod.get('restartPolicy')!r} is not Never or OnFailure, as a Job demands"
  volumes = [volume["name"] for volume in pod.get("volumes", [])]
  for container in pod["containers"]:
    for mount in container.get("volumeMounts", []):
      if mount["name"] not in volumes:
        yield f"{where}: the mount {mount['name']!r} is not one of the volumes {', '.join(volumes)}"
      if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
        yield f"{where}: mountPath={mount['mountPath']!r} is not an absolute path without ':'"
    for variable in container.get("env", []):
      if ("value" in variable) == ("valueFrom" in variable):
        yield f"{where}: {variable['name']} has either value or valueFrom"
    if container["resources"]["requests"] != container["resources"]["limits"]:
      yield f"{where}: requests and limits of accelerators must be equal"


def _tpu(job: Mapping[str, Any], where: str) -> Iterator[str]:
  """Checks that the hosts have all chips of the slice. Otherwise, GKE would never schedule the pods."""
  pod = job["template"]["spec"]
  labels = pod.get("nodeSelector", {})
  chips = [container["resources"]["limits"].get("google.com/tpu", 0) for container in pod["containers"]]
  label, shape = (labels.get(f"cloud.google.com/gke-tpu-{key}") for key in ("accelerator", "topology"))
  if bool(sum(chips)) != bool(label) or bool(label) != bool(shape):
    yield f"{where}: google.com/tpu, gke-tpu-accelerator and gke-tpu-topology must be set together"
    return
  if label is None or shape is None:
    return
  if label not in [product.label for product in PRODUCTS.values()]:
    yield f"{where}.nodeSelector: gke-tpu-accelerator={label!r} is not an accelerator of GKE"
  product = 1
  for length in shape.split("x"):
    product *= int(length)
  if sum(chips) * job["completions"] != product:
    yield (
      f"{where}: {job['completions']} hosts of {sum(chips)} chips are {sum(chips) * job['completions']}, but topology "
      f"{shape} has {product}"
    )
