"""The command line: one thin file per command, one output object for all of them."""
