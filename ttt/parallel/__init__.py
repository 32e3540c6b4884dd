"""Several processes on one run: how they are started, what each does, and how they agree.

`layout` says how many processes do what, and needs no torch; `world` is the place of this process among them.
"""
