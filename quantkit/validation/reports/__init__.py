"""The report of a validation, in every form that it is written."""
