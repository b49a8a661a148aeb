"""Three small models and their data, so that the main job runs offline in minutes, and verdicts meet known truths.

They are test models: trained on a CPU in an hour or two each by `expunge testbed`, and loaded like any other model.
"""
