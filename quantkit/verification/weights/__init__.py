"""The weights themselves, against their source."""
