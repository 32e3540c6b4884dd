"""Evaluation: what a run was worth, with the error of every number.

    statistics.py     means of units, their standard errors over clusters, paired differences of two arms
    by_position.py    loss by position in log-spaced bins, and curves that are smoothed
    ratings.py        human pairwise ratings: a folder for raters, and what they filled in
    strengths.py      Bradley–Terry strengths and Elo numbers from such ratings
    compare.py        two evaluations paired item by item, if they are of the same; `comparing.py` reads them

This module imports nothing; the rooms below import no torch until a model is measured.
"""
