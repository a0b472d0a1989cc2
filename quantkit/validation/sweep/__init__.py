"""Models × recipes × settings, each quantized and validated, and one leaderboard."""
