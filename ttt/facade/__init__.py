"""A model with TTT in the manner of PEFT: wrapped, trained, saved, loaded, and unwrapped again in Python."""
