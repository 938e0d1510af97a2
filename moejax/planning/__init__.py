"""Predicts step time, memory and sharding of an experiment on a topology from the compiled program, without the
hardware."""
