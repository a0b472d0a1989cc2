"""The verification runtime: a checkpoint reloaded with real kernels, as an engine serves it."""
