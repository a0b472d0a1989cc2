"""The YAML boundary: what a recipe may say, its units, gates and documents."""
