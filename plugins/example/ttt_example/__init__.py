"""A backbone for ttt: a small transformer over the bytes of a text."""
