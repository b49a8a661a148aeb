"""Samples from a denoiser on whatever devices there are: preparation and evaluation both draw theirs here."""
