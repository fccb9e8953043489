"""The shop's tables. Money is in cents; times are UTC without a ``tzinfo``."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from flask_login import UserMixin
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Mapped, mapped_column, relationship
from werkzeug.security import check_password_hash, generate_password_hash

from .extensions import db

LongText = sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")
Blob = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def now() -> dt.datetime:
    """The current time as stored in the tables: UTC, in whole seconds, without a ``tzinfo``."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0)


class User(UserMixin, db.Model):
    """A user account."""

    __tablename__ = "shop_user"  # USER and ORDER are reserved words of SQL

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)
    """In lower case, so that each address has only one account."""
    name: Mapped[str] = mapped_column(sa.String(100))
    password_hash: Mapped[str] = mapped_column(sa.String(255))
    is_admin: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[dt.datetime] = mapped_column(default=now)

    def set_password(self, password: str) -> None:
        self.password_hash = generate_password_hash(password)

    def has_password(self, password: str) -> bool:
        return check_password_hash(self.password_hash, password)


class Product(db.Model):
    """A product for sale."""

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(sa.String(40), unique=True)
    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    category: Mapped[str] = mapped_column(sa.String(60), default="")
    price_cents: Mapped[int]
    stock: Mapped[int] = mapped_column(default=0)
    photo: Mapped[str | None] = mapped_column(sa.String(32))
    """The name of the photo's files; each photo has its own name."""
    photo_job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    thumbnails_at: Mapped[dt.datetime | None]
    """When the thumbnails of ``photo`` were made."""


class Order(db.Model):
    """A product bought by a user."""

    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("shop_user.id"), index=True)
    product_id: Mapped[int] = mapped_column(sa.ForeignKey("product.id"), index=True)
    quantity: Mapped[int]
    unit_price_cents: Mapped[int]
    """The price at the time of the order."""
    created_at: Mapped[dt.datetime] = mapped_column(default=now, index=True)

    user: Mapped[User] = relationship(lazy="joined")
    product: Mapped[Product] = relationship(lazy="joined")
    mail: Mapped[OutboxMail | None] = relationship(back_populates="order")

    @property
    def total_cents(self) -> int:
        return self.quantity * self.unit_price_cents


class OutboxMail(db.Model):
    """A receipt: created once per order, and sent if ``sent_at`` is set."""

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(sa.ForeignKey("shop_order.id"), unique=True)
    """Unique, so that a receipt job that runs twice finds the mail it wrote the first time."""
    recipient: Mapped[str] = mapped_column(sa.String(254))
    subject: Mapped[str] = mapped_column(sa.String(200))
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    sent_at: Mapped[dt.datetime | None]
    transport: Mapped[str | None] = mapped_column(sa.String(20))
    """``smtp``, or ``outbox`` if no mail server is configured."""

    order: Mapped[Order] = relationship(back_populates="mail")


class ProductUpload(db.Model):
    """An uploaded CSV file of products, and the state of its import."""

    id: Mapped[int] = mapped_column(primary_key=True)
    filename: Mapped[str] = mapped_column(sa.String(200))
    content: Mapped[bytes] = mapped_column(Blob, deferred=True)
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    finished_at: Mapped[dt.datetime | None]
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Not a foreign key, because finished jobs are pruned and uploads are kept."""

    rows_done: Mapped[int] = mapped_column(default=0)
    """Number of committed rows, after which another attempt continues."""
    created: Mapped[int] = mapped_column(default=0)
    updated: Mapped[int] = mapped_column(default=0)
    unchanged: Mapped[int] = mapped_column(default=0)
    bad: Mapped[int] = mapped_column(default=0)


class Report(db.Model):
    """The sales between two days, inclusive. Its job stores the report as CSV in ``content``."""

    id: Mapped[int] = mapped_column(primary_key=True)
    since: Mapped[dt.date]
    until: Mapped[dt.date]
    content: Mapped[str | None] = mapped_column(LongText, deferred=True)
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    finished_at: Mapped[dt.datetime | None]
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
