"""An example of a quantkit backend in a package of its own."""
