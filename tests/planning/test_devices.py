"""What is said when a compiler is missing, or does not know a shape."""

from importlib import metadata

import pytest
from jax.experimental import topologies

from moejax.errors import UserError
from moejax.planning.devices import describe_devices
from moejax.planning.topology import parse_topology


def refuse(*_, **__):
  raise RuntimeError("INVALID_ARGUMENT: no such layout\nwith a trace")


def absent(name: str) -> str:
  raise metadata.PackageNotFoundError(name)


def test_without_libtpu_the_pip_command_is_named(monkeypatch):
  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  monkeypatch.setattr(metadata, "version", absent)
  with pytest.raises(UserError, match=r'libtpu, which is not installed; pip install --upgrade "jax\[tpu\]"'):
    describe_devices(parse_topology("v5p:4x8x8"))


def test_a_shape_that_libtpu_refuses_is_named_with_its_reason_and_version(monkeypatch):
  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  monkeypatch.setattr(metadata, "version", lambda name: "0.1")
  with pytest.raises(
    UserError, match=r"libtpu 0\.1 does not describe v5p:3x3x3: INVALID_ARGUMENT: no such layout; try"
  ):
    describe_devices(parse_topology("v5p:3x3x3"))


def test_without_the_compiler_for_gpus_the_pip_command_is_named(monkeypatch):
  version = metadata.version
  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  monkeypatch.setattr(metadata, "version", lambda name: absent(name) if "plugin" in name else version(name))
  with pytest.raises(UserError, match=r"not installed; pip install \"moejax\[gpu-plan\]\" or pip install jax-cuda12"):
    describe_devices(parse_topology("gpu:h100:8"))


def test_gpus_that_do_not_fill_their_nodes_are_refused():
  with pytest.raises(UserError, match=r"gpu:h100:12 has 12 GPUs, which is not a multiple of the 8 GPUs of a node"):
    describe_devices(parse_topology("gpu:h100:12"))


def test_more_simulated_devices_than_there_are_is_refused():
  with pytest.raises(UserError, match="needs 4096 simulated devices, but JAX has 8"):
    describe_devices(parse_topology("cpu:4096"))
