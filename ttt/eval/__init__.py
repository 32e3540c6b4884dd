"""Evaluation: what a run was worth, with the error of every number.

    tasks.py          what a task of items is: its items, how it measures them, its outcomes; `items.py` has their rows
    choosing.py       which tasks are measured; `listing.py` lists their items and draws from them
    bench.py          what a task measures with: the model under one arm, scores of clips, streams
    engine.py         measures items under each arm, and tells which failed; `in_training.py` does so for a run
    folder.py         what is kept on the disk, gone on with, and refused
    variants.py       every score of a clip from one pass
    sources.py        books and texts; `long_streams.py` has their losses by position
    inner_loss.py, recall.py, rated.py, speech/, video/     the tasks

    statistics.py     means of units, their standard errors over clusters, paired differences of two arms
    by_position.py    loss by position in log-spaced bins, and curves that are smoothed
    results.py        what rows amount to; `writing.py` writes it, with `report.py` and `pictures.py`
    compare.py        two evaluations paired item by item, if they are of the same; `comparing.py` reads them
    ratings.py        human pairwise ratings: a folder for raters, and what they filled in
    strengths.py      Bradley–Terry strengths and Elo numbers from such ratings

This module imports nothing; the rooms below import no torch until a model is measured.
"""
