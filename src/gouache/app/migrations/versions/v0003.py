"""Adds AutoV3, the hash by which pictures refer to LoRAs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("file", sa.Column("autov3", sa.String, nullable=True))
    op.create_index("ix_file_autov3", "file", ["autov3"])
