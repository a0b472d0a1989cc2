"""What a tensor of a checkpoint is, by names, shapes and the config: no model class is loaded."""
