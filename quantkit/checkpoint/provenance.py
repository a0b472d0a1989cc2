"""The names of what quantkit adds to an output directory."""

from __future__ import annotations

PROVENANCE = "quantkit.json"
RESUME_FOLDER = ".stream"
"""In `DIR.partial`: what a run that can be resumed remembers, until the output is complete."""
