"""A quantized linear layer: its description, its activations and its kernels."""
