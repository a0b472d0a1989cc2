"""The decoder: attention, MLP, norms, rotary embeddings, the cache and generation."""
