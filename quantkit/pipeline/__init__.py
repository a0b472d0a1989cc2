"""From a request to a published checkpoint: plan, quantize, stream or export, finish, publish."""
