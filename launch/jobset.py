"""Makes a Kubernetes JobSet that runs a job on GKE: one Job per TPU slice, or one Job for all GPU nodes.

The API is jobset.x-k8s.io/v1alpha2 of JobSet 0.10 or newer. Restarts:

- After exit code 75 (preempted with a saved state) or the eviction of a pod, the podFailurePolicy fails the Job, and
  the JobSet restarts all Jobs. This does not count as a restart.
- Exit codes 2 and 3 (a mistake, or a model that does not fit) end the JobSet, because a restart would not help.
- Any other failure exceeds the backoffLimit of 0 of the Job, and the JobSet restarts all Jobs up to max_restarts times.
"""

import dataclasses
from typing import Any

from moejax.interrupts import SAVED_PREEMPTION
from moejax.launch.hosts import Hosts
from moejax.launch.job import Job

API = "jobset.x-k8s.io/v1alpha2"
CONTAINER = "moejax"
MISTAKES = (2, 3)
"""Exit codes after which a restart would not help."""
COORDINATOR_PORT = 8482


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of a JobSet in addition to the job and its hosts."""

  name: str
  """Name of the JobSet, a DNS label."""
  image: str
  """Container image with moejax."""
  claim: str
  """PersistentVolumeClaim that all hosts can write to."""
  mount: str = "/data"
  """Mount path of the claim."""
  max_restarts: int = 10
  """Maximum number of restarts after failures other than preemptions."""
  spot: bool = False
  """Whether it runs on Spot nodes."""
  queue: str | None = None
  """LocalQueue of Kueue, or None without Kueue."""
  grace_s: int = 120
  """Seconds between SIGTERM and SIGKILL."""


def make_jobset(job: Job, hosts: Hosts, settings: Settings) -> dict[str, Any]:
  """The JobSet as JSON data."""
  metadata: dict[str, Any] = {"name": settings.name}
  if hosts.is_tpu:  # a slice is a node pool of its own, and its hosts must not be those of two slices
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  if settings.queue:
    metadata["labels"] = {"kueue.x-k8s.io/queue-name": settings.queue}
  return {
    "apiVersion": API,
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "successPolicy": {"operator": "All"},
      "failurePolicy": {
        "maxRestarts": settings.max_restarts,
        "restartStrategy": "BlockingRecreate",  # no process of the last attempt is left in the work directory
        "rules": [
          {
            "name": "mistake",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"exit code ({'|'.join(map(str, MISTAKES))}) matching"],
          },
          {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          },
        ],
      },
      "replicatedJobs": [
        {"name": _role(hosts), "replicas": hosts.slices, "template": {"spec": _job_spec(job, hosts, settings)}}
      ],
    },
  }


def _role(hosts: Hosts) -> str:
  return "slice" if hosts.is_tpu else "node"


def _job_spec(job: Job, hosts: Hosts, settings: Settings) -> dict[str, Any]:
  def fail_job(*codes: int) -> dict[str, Any]:
    return {
      "action": "FailJob",
      "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(codes)},
    }

  return {
    "parallelism": hosts.per_slice,
    "completions": hosts.per_slice,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        fail_job(*MISTAKES),
        fail_job(SAVED_PREEMPTION),
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
      ]
    },
    "template": {"spec": _pod_spec(job, hosts, settings)},
  }


def _pod_spec(job: Job, hosts: Hosts, settings: Settings) -> dict[str, Any]:
  resource = "google.com/tpu" if hosts.is_tpu else "nvidia.com/gpu"
  chips = {resource: hosts.chips}
  container: dict[str, Any] = {
    "name": CONTAINER,
    "image": settings.image,
    "command": list(job.command),
    # The ports of libtpu between the hosts of a slice, and of JAX's coordinator.
    "ports": [{"containerPort": port} for port in ((8471, COORDINATOR_PORT) if hosts.is_tpu else (COORDINATOR_PORT,))],
    "resources": {"requests": chips, "limits": dict(chips)},
    "volumeMounts": [{"name": "workdir", "mountPath": settings.mount}],
  }
  volumes: list[dict[str, Any]] = [{"name": "workdir", "persistentVolumeClaim": {"claimName": settings.claim}}]
  if not hosts.is_tpu:
    container["env"] = _processes(hosts, settings)
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL's buffers exceed the default of 64 MB
  spec: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": settings.grace_s,
    "nodeSelector": _node_labels(hosts, settings),
    "containers": [container],
    "volumes": volumes,
  }
  if settings.spot:
    spec["tolerations"] = [
      {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    ]
  return spec


def _node_labels(hosts: Hosts, settings: Settings) -> dict[str, str]:
  if hosts.is_tpu:
    labels = {
      "cloud.google.com/gke-tpu-accelerator": hosts.product.label,
      "cloud.google.com/gke-tpu-topology": hosts.shape,
    }
  else:
    labels = {"cloud.google.com/gke-accelerator": hosts.product.label}
  return labels | ({"cloud.google.com/gke-spot": "true"} if settings.spot else {})


def _processes(hosts: Hosts, settings: Settings) -> list[dict[str, Any]]:
  """Environment variables by which the processes of GPU nodes find each other. On TPUs, GKE sets them."""
  first = f"{settings.name}-{_role(hosts)}-0-0.{settings.name}"
  index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
  return [
    {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{COORDINATOR_PORT}"},
    {"name": "JAX_NUM_PROCESSES", "value": str(hosts.count)},
    {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": index}},
  ]
