"""An example of a backbone plugin for ttt: a small transformer over the bytes of a text."""
