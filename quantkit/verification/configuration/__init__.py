"""What config.json says, against the tensors and the plan."""
