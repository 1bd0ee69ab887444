"""One interface over ``gs://`` prefixes and local directories."""
