"""The arithmetic of the norms for each device: sets of four functions, see formulas.py."""
