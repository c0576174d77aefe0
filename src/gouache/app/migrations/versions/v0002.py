"""Adds the VAE that a checkpoint is painted with."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("about", sa.Column("vae", sa.String, nullable=False, server_default=""))
