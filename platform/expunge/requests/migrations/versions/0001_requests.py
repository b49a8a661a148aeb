"""Requests, batches and the audit trail."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    op.create_table(
        "batches",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("created", time, nullable=False),
        sa.Column("closed", time),
        sa.Column("report", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("external_id", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("batch", sa.String(63)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("due", sa.Date),
        sa.Column("accepted_at", time, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("evidence", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
        sa.ForeignKeyConstraint(["batch"], ["batches.id"], name="fk_requests_batch_batches"),
        sa.UniqueConstraint("model", "external_id", name="uq_requests_model"),
    )
    op.create_index("ix_requests_queue", "requests", ["state", "priority", "due", "accepted_at"])
    op.create_table(
        "batch_requests",
        sa.Column("batch", sa.String(63), nullable=False),
        sa.Column("position", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("request", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("batch", "position", name="pk_batch_requests"),
        sa.ForeignKeyConstraint(["batch"], ["batches.id"], name="fk_batch_requests_batch_batches"),
        sa.ForeignKeyConstraint(["request"], ["requests.id"], name="fk_batch_requests_request_requests"),
    )
    op.create_index("ix_batch_requests_request", "batch_requests", ["request"])
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("request", sa.String(63), nullable=False),
        sa.Column("at", time, nullable=False),
        sa.Column("previous", sa.String(16)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("batch", sa.String(63)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sa.ForeignKeyConstraint(["request"], ["requests.id"], name="fk_events_request_requests"),
    )
    op.create_index("ix_events_request", "events", ["request"])


def downgrade() -> None:
    for table in ("events", "batch_requests", "requests", "batches"):
        op.drop_table(table)
