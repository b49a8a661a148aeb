"""MLflow: runs, registered versions with their ledger and evidence, promotion and rollback."""

from expunge.registry.pipelines import load_pipeline
from expunge.registry.tracking import Tracker

__all__ = ["Tracker", "load_pipeline"]
