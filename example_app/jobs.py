"""The shop's background jobs.

A job may run more than once. Each of these either checks what has already been done, or can safely
do it again.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import io
import itertools
import time
import zoneinfo
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from flask_bgjobs import Fail, Limit, Retry, current_job

from . import mail, photos, products_csv
from .config import IMAGE_QUEUE
from .extensions import bgjobs, db
from .formats import money
from .models import Order, OutboxMail, Product, ProductUpload, Report, now
from .products_csv import BadRow, ProductRow

IMPORT_CHUNK = 100
"""Rows per transaction: few enough that orders on SQLite need not wait long for the write lock."""
MAX_BAD_LINES_LOGGED = 20
UPLOAD_DAYS = 7
TIME_ZONE = "Europe/Berlin"
"""The time zone of the shop."""
MAIL_SERVER = Limit("mail server", rate=60, per=60, burst=10)
"""What the mail server accepts from all workers together: 60 mails a minute, up to ten at once."""


class SampleJob:
    """The job of ``/test-background-job``."""

    def execute(self, message: str) -> str:
        current_job.log(f"SampleJob says: {message}")
        return message.upper()


class FlakyJob:
    """Fails at first and succeeds later, to demonstrate retries."""

    def execute(self, succeed_on: int = 3) -> str:
        """:param succeed_on: number of the attempt that succeeds."""
        if current_job.attempt < succeed_on:
            raise ConnectionError(f"the warehouse did not answer (attempt {current_job.attempt})")
        return f"the warehouse answered on attempt {current_job.attempt}"


class DeclinedPayment:
    """Fails without retries, because a declined card would be declined again."""

    def execute(self, order_number: int) -> None:
        raise Fail(f"the card for order {order_number} was declined")


class StockCount:
    """A slow job that reports progress and can be cancelled."""

    def execute(self, shelves: int = 60, seconds_per_shelf: float = 0.5) -> int:
        for shelf in range(1, shelves + 1):
            time.sleep(seconds_per_shelf)
            current_job.progress(shelf / shelves, f"{shelf} of {shelves} shelves")
            if shelf % 10 == 0:
                current_job.log(f"shelf {shelf} counted")
        return shelves


@bgjobs.job(
    queue="mail",
    retries=5,
    retry_delay=10,
    backoff="exponential",
    timeout=60,
    limits=MAIL_SERVER,
)
def send_receipt(order_id: int) -> str:
    """Send the receipt of an order, once.

    After a crash between the mail server's reply and the commit, the mail is sent again with the
    same Message-ID. SMTP offers no way to avoid this.
    """
    receipt = _receipt(db.session.get_one(Order, order_id))
    if receipt.sent_at is not None:
        return "already sent"
    try:
        receipt.transport = mail.deliver(receipt)
    except mail.MailDelayed as error:
        raise Retry(str(error)) from error
    except mail.MailRefused as error:
        raise Fail(str(error)) from error
    receipt.sent_at = now()
    db.session.commit()
    return f"{receipt.transport}: {receipt.recipient}"


def _receipt(order: Order) -> OutboxMail:
    if order.mail is None:
        order.mail = OutboxMail(
            recipient=order.user.email,
            subject=f"Your order {order.id}: {order.product.name}",
            body=(
                f"Dear {order.user.name},\n\nthank you for your order.\n\n"
                f"{order.quantity} x {order.product.name} ({order.product.sku})\n"
                f"Total: {money(order.total_cents)}\n\nYour shop\n"
            ),
        )
        # Committed first, so that no lock is held while waiting for the mail server.
        db.session.commit()
    return order.mail


@bgjobs.job(queue="imports", retries=3, timeout=600, limits=Limit("imports", concurrency=1))
def import_products(upload_id: int) -> dict[str, int]:
    """Create or update products from an uploaded CSV file, by SKU.

    Each chunk is committed together with the number of processed rows, so that another attempt
    continues where the last one ended, and every row is counted once. Two imports never run at the
    same time, because both could create the same product.
    """
    upload = db.session.get_one(ProductUpload, upload_id)
    try:
        total = products_csv.count(upload.content)
    except products_csv.NotAProductFile as error:
        raise Fail(str(error)) from error
    current_job.log(f"{upload.filename}: {total} rows, {upload.rows_done} already processed")
    rows = itertools.islice(products_csv.parse(upload.content), upload.rows_done, None)
    for chunk in _batched(rows, IMPORT_CHUNK):
        _import_chunk(upload, chunk)
        db.session.commit()
        current_job.progress(upload.rows_done / total, f"{upload.rows_done} of {total} rows")
    upload.finished_at = now()
    db.session.commit()
    counts = {name: getattr(upload, name) for name in ("created", "updated", "unchanged", "bad")}
    current_job.log(", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def _batched(rows: Iterator[ProductRow | BadRow], size: int) -> Iterator[list[ProductRow | BadRow]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _import_chunk(upload: ProductUpload, chunk: list[ProductRow | BadRow]) -> None:
    skus = [row.sku for row in chunk if isinstance(row, ProductRow)]
    known = db.session.scalars(sa.select(Product).where(Product.sku.in_(skus)))
    products = {product.sku: product for product in known}
    for row in chunk:
        if isinstance(row, BadRow):
            _count_bad(upload, row)
        elif row.sku in products:
            _update(upload, products[row.sku], row)
        else:
            products[row.sku] = _create(upload, row)
    upload.rows_done += len(chunk)


def _count_bad(upload: ProductUpload, row: BadRow) -> None:
    upload.bad += 1
    if upload.bad <= MAX_BAD_LINES_LOGGED:
        current_job.log(f"line {row.line}: {row.reason}")
    elif upload.bad == MAX_BAD_LINES_LOGGED + 1:
        current_job.log("further bad lines are counted but not listed")


def _create(upload: ProductUpload, row: ProductRow) -> Product:
    product = Product(**dataclasses.asdict(row))
    db.session.add(product)
    upload.created += 1
    return product


def _update(upload: ProductUpload, product: Product, row: ProductRow) -> None:
    changes = {
        name: value
        for name, value in dataclasses.asdict(row).items()
        if getattr(product, name) != value
    }
    for name, value in changes.items():
        setattr(product, name, value)
    if changes:
        upload.updated += 1
    else:
        upload.unchanged += 1


@bgjobs.job(queue="reports", retries=2, timeout=300)
def build_sales_report(report_id: int) -> int:
    """Build a sales report as CSV.

    Running it again overwrites the same columns, so it need not check whether it has run before.

    :returns: the number of products sold.
    """
    return _build(db.session.get_one(Report, report_id))


@bgjobs.job(cron="0 3 * * *", timezone=TIME_ZONE, queue="reports", retries=2, timeout=300)
def report_last_day() -> int:
    """Build the sales report of the day before, every night.

    :returns: the number of products sold.
    """
    report = db.session.scalar(sa.select(Report).filter_by(job_id=current_job.id))
    if report is None:
        # Another attempt of this job finds it by the id of the job.
        tick: dt.datetime = current_job.meta["tick"]
        day = tick.astimezone(zoneinfo.ZoneInfo(TIME_ZONE)).date() - dt.timedelta(days=1)
        report = Report(since=day, until=day, job_id=current_job.id)
        db.session.add(report)
        db.session.commit()
    return _build(report)


@bgjobs.job(unique="{product_id}", debounce=10, debounce_max=60, queue="stock", timeout=30)
def sync_stock(product_id: int) -> int:
    """Tell the marketplaces how many pieces of a product are left.

    Several orders within seconds need one message only. This shop has no marketplaces, so the
    message is a log line of the job.

    :returns: the number of pieces.
    """
    product = db.session.get_one(Product, product_id)
    current_job.log(f"{product.sku}: {product.stock} in stock")
    return product.stock


@bgjobs.job(every=60, retries=0, timeout=30)
def discard_old_uploads() -> int:
    """Discard the files of imports that finished a week ago.

    :returns: their number.
    """
    is_old = (
        ProductUpload.finished_at < now() - dt.timedelta(days=UPLOAD_DAYS),
        sa.func.length(ProductUpload.content) > 0,
    )
    discarded = db.session.execute(sa.update(ProductUpload).where(*is_old).values(content=b""))
    db.session.commit()
    return int(discarded.rowcount)


def _build(report: Report) -> int:
    sales = db.session.execute(_sales(report.since, report.until)).all()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sku", "name", "orders", "pieces", "revenue"])
    for sku, name, orders, pieces, cents in sales:
        writer.writerow([_cell(sku), _cell(name), orders, pieces, f"{cents / 100:.2f}"])
    report.content = text.getvalue()
    report.finished_at = now()
    db.session.commit()
    current_job.log(f"{len(sales)} products sold from {report.since} to {report.until}")
    return len(sales)


def _sales(since: dt.date, until: dt.date) -> sa.Select[Any]:
    first = dt.datetime.combine(since, dt.time.min)
    end = dt.datetime.combine(until + dt.timedelta(days=1), dt.time.min)
    revenue = sa.func.sum(Order.quantity * Order.unit_price_cents)
    return (
        sa.select(
            Product.sku, Product.name, sa.func.count(Order.id), sa.func.sum(Order.quantity), revenue
        )
        .join(Order, Order.product_id == Product.id)
        .where(Order.created_at >= first, Order.created_at < end)
        .group_by(Product.id, Product.sku, Product.name)
        .order_by(revenue.desc(), Product.sku)
    )


def _cell(text: str) -> str:
    # Quoted, because a spreadsheet would evaluate a cell that starts like a formula.
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


@bgjobs.job(queue=IMAGE_QUEUE, retries=1, timeout=30)
def make_thumbnails(product_id: int, photo: str) -> str:
    """Make the thumbnails of a product's photo, unless the photo has been replaced.

    Runs in a child process, because its queue is in ``BGJOBS_QUEUE_POOLS``. There a timeout also
    stops the code of C libraries, and a crash affects only this job.
    """
    if not _has_photo(product_id, photo):
        return _remove_replaced_photo(photo)
    try:
        for done, made in enumerate(photos.make_thumbnails(photo), 1):
            current_job.log(f"{made.width} x {made.height} pixels, {made.bytes:,} bytes")
            total = len(photos.SIZES)
            current_job.progress(done / total, f"{done} of {total} sizes")
    except photos.NotAPhoto as error:
        raise Fail(str(error)) from error
    made_now = (
        sa.update(Product)
        .where(Product.id == product_id, Product.photo == photo)
        .values(thumbnails_at=now())
    )
    is_shown = db.session.execute(made_now).rowcount == 1
    db.session.commit()
    return "made" if is_shown else _remove_replaced_photo(photo)


def _has_photo(product_id: int, photo: str) -> bool:
    product = db.session.get(Product, product_id)
    has_it = product is not None and product.photo == photo
    # Ends the transaction, so that none is open while the thumbnails are made.
    db.session.commit()
    return has_it


def _remove_replaced_photo(photo: str) -> str:
    photos.remove(photo)
    return "photo was replaced"
