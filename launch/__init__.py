"""Launchers, which start the processes of a program on one machine, GKE, TPU VMs or SLURM."""
