"""The pipeline: its definition, and the commands that compile, submit, rerun and run it locally."""
