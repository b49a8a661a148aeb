"""Decoding of pictures that strangers send: containers are stripped to what makes pixels, then decoded in a process of
its own, which has no key, little memory and little time.

Nothing here imports more than Pillow and the standard library: the decoding process should start at once.
"""
