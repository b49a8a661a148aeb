"""Tenants, the tokens with which they come, and the answers that a repeated request gets again."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.add_column("requests", sa.Column("tenant", sa.String(63), nullable=False, server_default="default"))
    op.create_index("ix_requests_tenant", "requests", ["tenant", "accepted_at", "id"])
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("scopes", sa.String(100), nullable=False),
        sa.Column("created", time, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("expires", time),
        sa.Column("revoked", time),
        sa.Column("mac", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
    )
    op.create_table(
        "idempotency",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("content", sa.String(64), nullable=False),
        sa.Column("created", time, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("answer", sa.Text),
        sa.PrimaryKeyConstraint("key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created", "idempotency", ["created"])
