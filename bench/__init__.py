"""Speed measured as ratios in one run: our functions against a named floor and a named peer. `python -m bench`."""
