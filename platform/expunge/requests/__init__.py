"""Intake: safe image decoding, sealed storage of images, the durable store and the lifecycle of a request.

Import from the modules: reading a picture should not cost an import of the database.
"""
