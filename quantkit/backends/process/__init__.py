"""How a backend runs: the job, the worker that does it, and the parent that follows it."""
