"""Real serving engines: a process that loads a checkpoint, and the command that serves it."""
