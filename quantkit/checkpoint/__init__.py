"""What lies on disk: a checkpoint's directory, headers, tensors, config and network."""
