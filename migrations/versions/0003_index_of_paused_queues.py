"""An index of the paused queues.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-28 02:25:00.000000

"""

import sqlalchemy as sa
from alembic import op

# revision identifiers, used by Alembic.
revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade():
    op.create_index(
        op.f("ix_bgjobs_queue_paused"),
        "bgjobs_queue",
        ["paused_at"],
        unique=False,
        sqlite_where=sa.text("paused_at IS NOT NULL"),
        postgresql_where=sa.text("paused_at IS NOT NULL"),
    )


def downgrade():
    op.drop_index(op.f("ix_bgjobs_queue_paused"), table_name="bgjobs_queue")
