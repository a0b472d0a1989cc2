"""Adapters, one a library. They run in the worker and import nothing of ours but
`process/job.py` and each other."""
