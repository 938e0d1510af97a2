"""The JobSet of a job: what it holds, the rules that it keeps, and that each rule finds what breaks it."""

import copy
import json
import re
import shlex
import subprocess
import sys

import pytest

from moejax.errors import UserError
from moejax.launch import gke
from moejax.launch.jobset_rules import problems

ON_A_SLICE = ["--topology", "v5p:4x4x4", "--slices", "2", "--mesh.replica", "2", "--mesh.data", "64"]
ON_NODES = ["--topology", "gpu:h100:16", "--mesh.replica", "2", "--mesh.data", "8"]
NEEDED = ["--image", "registry/moejax:1", "--claim", "runs", "--workdir", "/data/run1"]


def render(capsys, *arguments: str) -> dict:
  gke.main(["train", "dense_6b4", "--mesh.expert", "1", "--mesh.model", "1", *arguments])
  return json.loads(capsys.readouterr().out)


@pytest.fixture
def on_slices(capsys) -> dict:
  return render(capsys, *NEEDED, *ON_A_SLICE)


def job_of(jobset: dict) -> dict:
  (replicated,) = jobset["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


def test_slices_are_jobs_and_hosts_their_pods(on_slices):
  (replicated,) = on_slices["spec"]["replicatedJobs"]
  job = job_of(on_slices)
  (container,) = job["template"]["spec"]["containers"]
  assert (replicated["replicas"], job["parallelism"], job["completions"], job["completionMode"]) == (
    2,
    16,
    16,
    "Indexed",
  )
  assert job["template"]["spec"]["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x4",
  }
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["command"][:5] == ["moejax", "train", "dense_6b4", "--workdir", "/data/run1"]
  assert container["command"][-4:] == ["--mesh.replica", "2", "--mesh.data", "64"]
  assert on_slices["metadata"]["annotations"] == {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
  }
  assert problems(on_slices) == []


def test_gpu_nodes_are_pods_of_one_job_that_know_their_coordinator(capsys):
  jobset = render(capsys, *NEEDED, *ON_NODES, "--name", "my-run", "--spot", "--queue", "team")
  job = job_of(jobset)
  (container,) = job["template"]["spec"]["containers"]
  environment = {variable["name"]: variable.get("value") for variable in container["env"]}
  assert job["parallelism"] == job["completions"] == 2
  assert environment["JAX_COORDINATOR_ADDRESS"] == "my-run-node-0-0.my-run:8482"
  assert environment["JAX_NUM_PROCESSES"] == "2"
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-h100-80gb"
  assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
  assert problems(jobset) == []


def test_a_saved_preemption_restarts_without_counting_and_a_mistake_ends_the_job(on_slices):
  """Follows the messages that Kubernetes writes for a failed pod through both policies."""
  rules = job_of(on_slices)["podFailurePolicy"]["rules"]
  policy = on_slices["spec"]["failurePolicy"]

  def action(exit_code: int | None, evicted: bool) -> str:
    for i, rule in enumerate(rules):
      if exit_code in rule.get("onExitCodes", {"values": []})["values"]:
        message = f"Container moejax for pod default/x-slice-0-3-abcde failed with exit code {exit_code} matching "
      elif evicted and "onPodConditions" in rule:
        message = "Pod default/x-slice-0-3-abcde has condition DisruptionTarget matching "
      else:
        continue
      message += f"FailJob rule at index {i}"
      for of_jobset in policy["rules"]:
        patterns = of_jobset.get("onJobFailureMessagePatterns", [""])
        if "PodFailurePolicy" in of_jobset["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
          return of_jobset["action"]
    return "RestartJobSet"  # the reason is BackoffLimitExceeded, for which no rule is

  assert action(75, False) == action(75, True) == "RestartJobSetAndIgnoreMaxRestarts"
  assert action(143, True) == action(137, True) == "RestartJobSetAndIgnoreMaxRestarts"
  assert action(2, False) == action(3, False) == "FailJobSet"
  assert action(1, False) == action(137, False) == "RestartJobSet"
  assert policy["maxRestarts"] == 10


BROKEN = {
  "restartPolicy=Never": lambda js: job_of(js)["template"]["spec"].update(restartPolicy="OnFailure"),
  "restartPolicy=None": lambda js: job_of(js)["template"]["spec"].pop("restartPolicy"),
  "both be the number of hosts": lambda js: job_of(js).update(parallelism=8),
  "must be Indexed": lambda js: job_of(js).update(completionMode="NonIndexed"),
  "completionMode is missing": lambda js: job_of(js).pop("completionMode"),
  "backoffLimit=3 must be 0": lambda js: job_of(js).update(backoffLimit=3),
  "topology 4x4x8 has 128": lambda js: selector(js).update({"cloud.google.com/gke-tpu-topology": "4x4x8"}),
  "16 hosts of 8 chips are 128": lambda js: [of.update({"google.com/tpu": 8}) for of in resources(js).values()],
  "must be set together": lambda js: selector(js).pop("cloud.google.com/gke-tpu-topology"),
  "requests and limits": lambda js: resources(js)["limits"].update({"google.com/tpu": 8}),
  "is not an accelerator of GKE": lambda js: selector(js).update({"cloud.google.com/gke-tpu-accelerator": "tpu-v5p"}),
  "containerName='main' is not one of moejax": lambda js: exit_codes(js).update(containerName="main"),
  r"values=\[3, 2\] are not different exit codes": lambda js: exit_codes(js).update(values=[3, 2]),
  r"values=\[0\] are not": lambda js: exit_codes(js).update(values=[0]),
  "operator='Is' is not In": lambda js: exit_codes(js).update(operator="Is"),
  "is not a DNS label": lambda js: js["metadata"].update(name="My_run"),
  "has 60 characters; pods' names allow 46": lambda js: js["metadata"].update(name="a" * 60),
  "no Job has a podFailurePolicy": lambda js: job_of(js).pop("podFailurePolicy"),
  "maxRestarts=-1 must not be negative": lambda js: js["spec"]["failurePolicy"].update(maxRestarts=-1),
  "action='Restart' is not one of": lambda js: js["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
  "'OOM' is not one of": lambda js: js["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReasons=["OOM"]),
  "names must differ": lambda js: js["spec"]["failurePolicy"]["rules"][0].update(name="preempted"),
  "rules.name='a b' must have": lambda js: js["spec"]["failurePolicy"]["rules"][0].update(name="a b"),
  "use All": lambda js: js["spec"]["successPolicy"].update(operator="Any"),
  "replicas=0 must be 1": lambda js: js["spec"]["replicatedJobs"][0].update(replicas=0),
  "the mount 'logs' is not one of": lambda js: container(js)["volumeMounts"][0].update(name="logs"),
  "mountPath='data' is not an absolute": lambda js: container(js)["volumeMounts"][0].update(mountPath="data"),
  "value or valueFrom": lambda js: container(js).update(env=[{"name": "A"}]),
  "containers is empty": lambda js: job_of(js)["template"]["spec"].update(containers=[]),
  ".suspended is unknown": lambda js: js["spec"].update(suspended=True),
  "parallelism='16' is not of type int": lambda js: job_of(js).update(parallelism="16"),
  "replicatedJobs=None is not a list": lambda js: js["spec"].update(replicatedJobs=None),
}  # fmt: skip
"""What is said, by what breaks the rule."""


def selector(jobset: dict) -> dict:
  return job_of(jobset)["template"]["spec"]["nodeSelector"]


def container(jobset: dict) -> dict:
  return job_of(jobset)["template"]["spec"]["containers"][0]


def resources(jobset: dict) -> dict:
  return container(jobset)["resources"]


def exit_codes(jobset: dict) -> dict:
  return job_of(jobset)["podFailurePolicy"]["rules"][0]["onExitCodes"]


@pytest.mark.parametrize("said", BROKEN)
def test_each_rule_finds_what_breaks_it(said, on_slices):
  broken = copy.deepcopy(on_slices)
  BROKEN[said](broken)
  with pytest.raises(AssertionError, match=said):
    assert not problems(broken), "\n".join(problems(broken))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([*NEEDED, "--topology", "v5p:4x4x4", "--mesh.data", "32"],
      "dense_6b4 on v5p:4x4x4: mesh .* does not tile the 64"),
    ([*NEEDED, "--topology", "v5p:4x4x8", "--mesh.data", "128", "--training.batch-size", "64"], "batch_size"),
    ([*NEEDED, *ON_A_SLICE, "--name", "Run_1"], "'Run_1' is not a DNS label"),
    ([*NEEDED, *ON_A_SLICE, "--name", "a" * 50], "has 50 characters; pods' names allow 46"),
    ([*NEEDED, *ON_A_SLICE, "--max-restarts", "-1"], "maxRestarts=-1 must not be negative"),
    ([*NEEDED, *ON_A_SLICE, "--mount", "/runs"], "--workdir /data/run1 is not inside the shared volume; use"),
    ([*NEEDED, *ON_A_SLICE, "--image", " "], "--image ' ' is not an image"),
    ([*NEEDED, *ON_A_SLICE, "--workdir", "run1"], "--workdir 'run1' is not an absolute"),
    ([*NEEDED, *ON_A_SLICE, "--model.num-layer", "2"], "model.num-layer"),
    (ON_A_SLICE, "the following arguments are required: --workdir, --image, --claim"),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_remedy(arguments, message, capsys):
  with pytest.raises(UserError, match=message) as error:
    render(capsys, *arguments)
  assert "\n" not in str(error.value)


def test_a_suite_is_checked_member_by_member(capsys):
  arguments = ["compare", "quickstart", *NEEDED, "--topology", "v6e:4x4", "--mesh.data", "16"]
  gke.main(arguments)
  assert problems(json.loads(capsys.readouterr().out)) == []
  with pytest.raises(UserError, match="quick_small on v6e:4x4: mesh"):
    gke.main([*arguments[:-1], "8"])


def test_the_command_writes_json_to_stdout_alone():
  command = [sys.executable, "-m", "moejax.launch.gke", "train", "quick_small", *NEEDED, "--topology", "v6e:4x4"]
  done = subprocess.run([*command, "--mesh.data", "16"], capture_output=True, text=True)
  assert (done.returncode, json.loads(done.stdout)["kind"]) == (0, "JobSet"), done.stderr
  assert "kubectl apply -f FILE" in done.stderr and "4 ct6e-standard-4t hosts" in done.stderr
  wrong = subprocess.run([*command, "--mesh.data", "5"], capture_output=True, text=True)
  assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


def test_every_example_of_the_help_renders(capsys):
  with pytest.raises(SystemExit):
    gke.main(["--help"])
  commands = re.findall(r"python -m moejax.launch.gke (.*?) >", capsys.readouterr().out.replace("\\\n", " "))
  assert len(commands) == 3
  for command in commands:
    gke.main(shlex.split(command))
    assert problems(json.loads(capsys.readouterr().out)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("nodes", [ON_A_SLICE, ON_NODES], ids=["slices", "nodes"])
def test_published_schemas_know_every_field(nodes, capsys):
  """JobSet's from the API models that Kubeflow Trainer publishes, the Job's from the API server's schema."""
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
  from kubernetes_validate import validate

  jobset = render(capsys, *NEEDED, *nodes, "--spot", "--queue", "team")
  read = JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
  assert not lost(jobset, read, "")
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job_of(jobset)}
  validate(job, "1.31", strict=True)
  unknown = copy.deepcopy(jobset)
  unknown["spec"]["failurePolicy"]["rules"][0]["onExit"] = [75]
  assert lost(unknown, JobsetV1alpha2JobSet.from_dict(unknown).to_dict(), "")


def lost(written, read, path: str) -> list[str]:
  """Paths of what was written and is not read again."""
  if isinstance(written, dict):
    return [p for key, value in written.items() for p in lost(value, (read or {}).get(key), f"{path}.{key}")]
  if isinstance(written, list):
    pairs = zip(written, read or [None] * len(written), strict=True)
    return [p for i, (value, other) in enumerate(pairs) for p in lost(value, other, f"{path}[{i}]")]
  return [] if written == read else [path]
