"""An id of the database itself, and how often each batch was started without getting any further."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_requests_arrival", "requests", ["accepted_at", "id"])  # what lists go by, page by page
    identity = op.create_table(
        "identity",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("value", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_identity"),
    )
    op.bulk_insert(identity, [{"name": "database", "value": secrets.token_hex(16)}])
    for name in ("starts", "advance"):
        op.add_column("batches", sa.Column(name, sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_index("ix_requests_arrival", "requests")
    for name in ("starts", "advance"):
        op.drop_column("batches", name)
    op.drop_table("identity")
