"""One engine each, driven inside its own environment; imports the standard library and the engine."""
