"""Decides between dense and MoE models for a pod and a budget, from planned step times and scaling laws."""
