"""What a model is asked: texts, choices, canaries, tasks."""
