"""One file a kernel; `base.py` is the contract, `select.py` the one ordered list."""
