"""What a job waits for, with an index of the waiting jobs.

Revision ID: 0007
Revises: 0006
Create Date: 2026-11-29 12:30:00.000000

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TIME = (
    sa.DateTime()
    .with_variant(mysql.DATETIME(fsp=6), "mariadb")
    .with_variant(mysql.DATETIME(fsp=6), "mysql")
)
QUEUED = "status = 'pending' OR status = 'scheduled' OR status = 'retrying'"
QUEUED_OR_WAITING = f"{QUEUED} OR status = 'waiting'"


def upgrade():
    op.add_column("bgjobs_job", sa.Column("waits_for", sa.String(length=16), nullable=True))
    op.add_column("bgjobs_job", sa.Column("waiting_on", sa.String(length=511), nullable=True))
    op.add_column("bgjobs_job", sa.Column("waiting_since", TIME, nullable=True))
    op.create_index(
        op.f("ix_bgjobs_job_waits"),
        "bgjobs_job",
        ["waits_for", "queue", "waiting_on", "waiting_since", "id"],
        unique=False,
        sqlite_where=sa.text("waits_for IS NOT NULL"),
        postgresql_where=sa.text("waits_for IS NOT NULL"),
    )
    replace_index_of_queues(QUEUED_OR_WAITING)


def downgrade():
    replace_index_of_queues(QUEUED)
    op.drop_index(op.f("ix_bgjobs_job_waits"), table_name="bgjobs_job")
    op.drop_column("bgjobs_job", "waiting_since")
    op.drop_column("bgjobs_job", "waiting_on")
    op.drop_column("bgjobs_job", "waits_for")


def replace_index_of_queues(condition):
    """Create the index for claims by queue with another condition, where it is partial."""
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        return
    op.drop_index(op.f("ix_bgjobs_job_claim_queue"), table_name="bgjobs_job")
    op.create_index(
        op.f("ix_bgjobs_job_claim_queue"),
        "bgjobs_job",
        ["status", "queue", "claim_rank", "run_at", "id"],
        unique=False,
        sqlite_where=sa.text(condition),
        postgresql_where=sa.text(condition),
    )
