"""On-disk layouts, each translated to and from one canonical `QuantWeight`.

`base.py` holds the contract; every other file is one layout, as pure functions on tensors.
"""
