"""The commands of docs/launch.md and launch/README.md: launchers accept them, scripts exist, and fields are known."""

import pathlib
import re
import shlex

import pytest

from moejax import lookup
from moejax.launch import gke, tpu_vm
from moejax.overrides import override

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = (ROOT / "docs" / "launch.md", ROOT / "launch" / "README.md")


def commands(begin: str) -> list[str]:
  """Commands of both documents that begin so, up to a pipe, a redirection or the next command."""
  found = []
  for path in DOCUMENTS:
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(rf"^ *({begin}.*)$|`({begin}[^`]*)`", text, re.M)
    found += [re.split(r" > | && ", a or b)[0] for a, b in lines]
  return found


@pytest.mark.parametrize("command", commands("python -m moejax.launch.gke"))
def test_the_command_writes_a_jobset(command, capsys):
  gke.main(shlex.split(command)[3:])
  assert '"kind": "JobSet"' in capsys.readouterr().out


@pytest.mark.parametrize("command", commands("python -m moejax.launch.tpu_vm"))
def test_the_command_prints_gcloud_commands(command, capsys):
  tpu_vm.main([*shlex.split(command)[3:], "--dry-run"])
  assert "gcloud compute tpus queued-resources create" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands("sbatch .*launch/slurm"))
def test_the_batch_script_is_there_and_gets_a_known_name_and_fields(command):
  words = shlex.split(command.removesuffix(" ..."))
  (script,) = [word for word in words if word.endswith(".sbatch")]
  assert (ROOT / script).is_file()
  name, *rest = words[words.index(script) + 1 :]
  fields = rest[2:] if rest[:1] == ["--workdir"] else rest
  find = lookup.find_experiment if "train" in script else lookup.find_suite
  override(find(name), fields)


def test_every_way_of_the_documents_is_tested_here():
  assert len(commands("python -m moejax.launch.gke")) == len(commands("python -m moejax.launch.tpu_vm")) == 2
  assert len(commands("sbatch .*launch/slurm")) == 6


def test_every_file_of_the_launchers_is_in_the_table():
  table = (ROOT / "launch" / "README.md").read_text()
  files = [path.name for path in (ROOT / "launch").rglob("*") if path.is_file() and path.suffix != ".pyc"]
  assert [name for name in files if name not in ("README.md", "__init__.py") and f"{name}`" not in table] == []
