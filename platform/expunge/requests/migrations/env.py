"""Alembic's entry. The store hands its open connection over: a migration is part of its transaction."""

from alembic import context

from expunge.requests.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
