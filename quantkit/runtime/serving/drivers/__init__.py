"""One engine each, driven inside its own environment: standard library and engine only."""
