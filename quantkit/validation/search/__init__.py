"""Which layers can bear which scheme, and the best assignment under a budget."""
