"""The step time, memory and sharding of an experiment on a pod that need not be there, from the compiled program."""
