"""What can be asked: the built-in runtime, a serving engine, Transformers."""
