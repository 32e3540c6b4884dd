"""What `make_speech_benchmark.py` makes its synthetic speech benchmark from.

    words.py       common words, and non-words made from them by phoneme swaps
    sentences.py   pairs of sentences from templates, one right and one wrong
    stories.py     short stories, each with its own ending and with another's
    reading.py     prose to read aloud for hours, with passages that come again
    speaking.py    espeak-ng: texts and phonemes to sound
    balance.py     choosing among candidates until no gate tells the pairs apart
    layouts.py     the published layouts, written and read
    gating.py      what length, energy and unigrams of codes score on a folder

The first four are text alone: they need neither espeak-ng nor torch.
"""
