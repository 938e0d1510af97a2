"""Enables huge pages for the large arrays of a training step on CPU.

XLA's CPU client allocates temporary memory in every step, and glibc returns it to the system after the step. As a
result, page faults take a third of the step time. Transparent huge pages reduce their number by a factor of 512. glibc
reads the setting when a process starts, so the process has to restart itself once. This is not done on accelerators,
where the large arrays are not in host memory.
"""

import glob
import os
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb=1"

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of NVIDIA and AMD GPUs and of TPUs."""


def restart_with_huge_pages() -> None:
  """Restarts this process with huge pages for malloc, unless they are already enabled or would not help."""
  set_already = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" in set_already or platform.libc_ver()[0] != "glibc" or not computes_on_cpu():
    return
  environment = {**os.environ, "GLIBC_TUNABLES": ":".join(filter(None, (set_already, TUNABLE)))}
  sys.stdout.flush()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def computes_on_cpu() -> bool:
  """Whether JAX will compute on the CPU, determined without importing JAX."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return platforms == "cpu" if platforms else not any(map(glob.glob, ACCELERATORS))
