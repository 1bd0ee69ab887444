"""What is read of files that nobody vouches for, whatever their format."""

TEXT_LIMIT = 1 << 20
"""Bytes of one text."""
