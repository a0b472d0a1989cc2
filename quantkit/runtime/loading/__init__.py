"""From a checkpoint's files to the layers of a model in memory."""
