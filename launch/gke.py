"""`python -m moejax.launch.gke`: writes a JobSet that trains or compares on GKE. Submits nothing and imports no JAX."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence

from moejax.errors import UserError
from moejax.launch.hosts import Hosts, hosts_of
from moejax.launch.job import Parser, make_job, make_parser
from moejax.launch.jobset import Settings, make_jobset
from moejax.launch.jobset_rules import problems

DESCRIPTION = """\
Write a Kubernetes JobSet that runs `moejax train` or `moejax compare` on the TPU slices or GPU nodes of a GKE cluster.
The experiment, its fields and its mesh are checked against the topology first. The manifest goes to stdout and is
JSON, which kubectl accepts as YAML. A summary and the next commands are printed to stderr."""

EPILOG = """\
examples:
  one v5p slice of 64 chips, which is 16 hosts:
    python -m moejax.launch.gke train dense_6b4 --topology v5p:4x4x4 --image IMAGE --claim runs \\
      --workdir /data/run1 --mesh.replica 1 > job.json
  two slices, gradients summed over the data-center network:
    python -m moejax.launch.gke train moe_6b4_64e --topology v5p:4x4x4 --slices 2 --image IMAGE --claim runs \\
      --workdir /data/run2 --mesh.replica 2 --mesh.expert 16 > job.json
  two nodes of eight H100 GPUs:
    python -m moejax.launch.gke train dense_6b4 --topology gpu:h100:16 --image IMAGE --claim runs \\
      --workdir /data/run3 --mesh.replica 2 --mesh.data 8 > job.json
  then:
    kubectl apply -f job.json

The cluster needs JobSet 0.10 or newer, and a PersistentVolumeClaim that all hosts can write to (ReadWriteMany, such as
Filestore), which is mounted at --mount. docs/launch.md has step-by-step instructions."""


def make_gke_parser() -> Parser:
  """The parser of this command. Fields of the experiment follow its options."""
  parser = make_parser(
    "moejax.launch.gke", DESCRIPTION, EPILOG, "work directory on the hosts, inside the shared volume at --mount"
  )
  parser.add_argument("--image", required=True, metavar="IMAGE", help="container image with moejax (launch/Dockerfile)")
  parser.add_argument("--claim", required=True, metavar="NAME", help="PersistentVolumeClaim, ReadWriteMany")
  parser.add_argument("--mount", default="/data", metavar="DIR", help="mount path of the volume (default: /data)")
  parser.add_argument("--name", metavar="NAME", help="name of the JobSet (default: from the experiment)")
  parser.add_argument(
    "--max-restarts", type=int, default=10, metavar="N",
    help="maximum number of restarts after failures, without preemptions with a saved state (default: 10)",
  )  # fmt: skip
  parser.add_argument("--spot", action="store_true", help="run on Spot nodes")
  parser.add_argument("--queue", metavar="NAME", help="submit to this LocalQueue of Kueue")
  parser.add_argument(
    "--grace-s", type=int, default=120, metavar="N",
    help="seconds from SIGTERM to SIGKILL, in which a preempted run saves its state (default: 120)",
  )  # fmt: skip
  return parser


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the manifest to stdout.

  Raises:
    UserError: If the arguments, the experiment or the topology are not valid.
  """
  known, overrides = make_gke_parser().parse_known_args(arguments)
  hosts = hosts_of(known.topology, known.slices)
  job = make_job(known.verb, known.experiment, known.workdir, overrides, hosts.topology)
  if pathlib.PurePosixPath(known.mount) not in pathlib.PurePosixPath(known.workdir).parents:
    raise UserError(
      f"--workdir {known.workdir} is not inside the shared volume; use {known.mount}/NAME, or set --mount"
    )
  if not known.image.strip() or re.search(r"\s", known.image):
    raise UserError(
      f"--image {known.image!r} is not an image name; use, for example, REGION-docker.pkg.dev/PROJECT/REPO/moejax"
    )
  settings = Settings(
    name=known.name or job.label,
    image=known.image,
    claim=known.claim,
    mount=known.mount,
    max_restarts=known.max_restarts,
    spot=known.spot,
    queue=known.queue,
    grace_s=known.grace_s,
  )
  jobset = make_jobset(job, hosts, settings)
  if wrong := problems(jobset):
    raise UserError(f"the JobSet is not valid: {wrong[0]}")
  json.dump(jobset, sys.stdout, indent=2)
  print()
  print(_summary(hosts, settings), file=sys.stderr)


def _summary(hosts: Hosts, settings: Settings) -> str:
  slices = f"{hosts.slices} slice{'s' if hosts.slices > 1 else ''} of " if hosts.is_tpu else ""
  return (
    f"{settings.name}: {slices}{hosts.per_slice} {hosts.machine} host{'s' if hosts.per_slice > 1 else ''} with "
    f"{hosts.chips} chip{'s' if hosts.chips > 1 else ''} each\n"
    f"submit:  kubectl apply -f FILE\n"
    f"watch:   kubectl get jobset {settings.name} --watch\n"
    f"log:     kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={settings.name},"
    f"batch.kubernetes.io/job-completion-index=0\n"
    f"no pods: kubectl describe jobset {settings.name}\n"
    f"stop:    kubectl delete jobset {settings.name}"
  )


if __name__ == "__main__":
  try:
    main()
  except UserError as mistake:
    print(f"moejax.launch.gke: {mistake}", file=sys.stderr)
    sys.exit(2)
