"""All experts of a layer as one product on a GPU, by the kernels that engines and torch have."""
