"""Two small models and their data, so that the main job runs offline in minutes.

They are test models: trained on a CPU in about an hour each by `jobs/testbed.py`, and loaded like any other model.
"""
