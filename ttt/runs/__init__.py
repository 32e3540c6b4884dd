"""Runs side by side: found in a folder, read from their files alone, compared in a table and in a picture.

    finding.py       which folders are runs
    run.py           one run: its state, its config, its numbers
    metrics_ends.py  the newest lines of a `metrics.jsonl`, and its curves, however long it is
    evaluations.py   what `ttt eval` found
    differing.py     the keys in which configs differ
    table.py         columns, rows, their order
    text.py, page.py, picture.py    the table for a terminal and as CSV, as an HTML page, the curves

Nothing here imports torch or writes to a run.
"""
