"""Photos of products.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-24 02:45:48.191151

"""

import sqlalchemy as sa
from alembic import op

# revision identifiers, used by Alembic.
revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade():
    op.add_column("product", sa.Column("photo", sa.String(length=32), nullable=True))
    op.add_column("product", sa.Column("photo_job_id", sa.BigInteger(), nullable=True))
    op.add_column("product", sa.Column("thumbnails_at", sa.DateTime(), nullable=True))


def downgrade():
    op.drop_column("product", "thumbnails_at")
    op.drop_column("product", "photo_job_id")
    op.drop_column("product", "photo")
