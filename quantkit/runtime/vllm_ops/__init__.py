"""vLLM's compiled operators, loaded without vLLM."""
