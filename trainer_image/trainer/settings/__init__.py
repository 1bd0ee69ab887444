"""The one list of settings, and where the values of a run come from."""
