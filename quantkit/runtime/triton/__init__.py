"""What runs on a CUDA device in Triton; nothing here is imported before it is needed."""
