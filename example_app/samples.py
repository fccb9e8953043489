"""Sample products, orders and jobs."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import io
import itertools
import random
from collections.abc import Iterator

import sqlalchemy as sa

from flask_bgjobs import Job, run_background_job

from .admin import save_photo, start_import, start_report
from .drawing import draw_photo
from .extensions import db
from .jobs import send_receipt
from .models import Order, Product, User, now

ADMIN_EMAIL = "admin@example.com"
CUSTOMER_EMAIL = "customer@example.com"
IMPORT_ROWS = 3_000
SAMPLE_ORDERS = 40
SAMPLE_PHOTOS = 24
"""The number of products on the first page."""

_ADJECTIVES = ("Small", "Large", "Blue", "Green", "Folding", "Sturdy", "Light", "Round", "Quiet")
_MATERIALS = ("oak", "steel", "linen", "glass", "cork", "wool", "clay", "bamboo", "paper")
_THINGS = {
    "Kitchen": ("bowl", "kettle", "bread board", "storage jar", "salt mill"),
    "Living": ("lamp", "cushion", "side table", "picture frame", "vase"),
    "Office": ("desk tray", "notebook", "pen holder", "book end", "waste basket"),
    "Garden": ("planter", "watering can", "lantern", "bird feeder", "stool"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Seeded:
    """The numbers of rows that :func:`seed` added."""

    products: int
    orders: int
    photos: int


def seed(admin_password: str) -> Seeded:
    """Fill an empty shop. Existing rows are kept, so it can be called again.

    :param admin_password: the new password of the administrator.
    """
    _administrator(admin_password)
    products = _products()
    orders = _orders()
    db.session.commit()
    return Seeded(products, orders, _photos())


def product_csv(rows: int = IMPORT_ROWS, bad_rows: int = 5) -> bytes:
    """A product file with some deliberately invalid lines. Its content is always the same."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sku", "name", "category", "price", "stock"])
    for number, (name, category, cents) in enumerate(itertools.islice(_catalogue(), rows), 1):
        price = "on request" if number % (rows // bad_rows) == 0 else f"{cents / 100:.2f}"
        writer.writerow([f"IMP-{number:05}", f"{name} no. {number}", category, price, number % 50])
    return text.getvalue().encode()


def enqueue_sample_jobs() -> list[Job]:
    """Enqueue a mix of jobs that succeed, report progress, wait, retry and fail."""
    run = run_background_job
    sample, flaky = "example_app.jobs.SampleJob", "example_app.jobs.FlakyJob"
    jobs = [
        run(sample, "execute", ["Hello from the shop"], retries=3),
        run(sample, "execute", {"message": "I go first"}, priority="high", tags=["sample"]),
        run(sample, "execute", ["I wait for twenty seconds"], delay=20, tags=["sample"]),
        run(flaky, "execute", {"succeed_on": 3}, retries=3, retry_delay=5, tags=["sample"]),
        run(flaky, "execute", {"succeed_on": 99}, retries=2, retry_delay=[2, 8], tags=["sample"]),
        run("example_app.jobs.DeclinedPayment", "execute", {"order_number": 1017}, retries=3),
        run("example_app.jobs.StockCount", "execute", {"shelves": 90}, priority="medium"),
        run("example_app.jobs.StockCount", "execute", {"shelves": 40}, tags=["cancel me"]),
    ]
    return jobs + _shop_jobs()


def _shop_jobs() -> list[Job]:
    today = now().date()
    upload = start_import("catalogue.csv", product_csv())
    report = start_report(today - dt.timedelta(days=30), today)
    newest = db.session.scalars(sa.select(Order.id).order_by(Order.id.desc()).limit(5)).all()
    mails = [send_receipt.using(tags=["receipt"]).enqueue(order_id) for order_id in newest]
    started = [db.session.get(Job, row.job_id) for row in (upload, report)]
    return [job for job in started if job is not None] + mails


def _administrator(password: str) -> None:
    admin = _user(ADMIN_EMAIL, "Ada Admin")
    admin.is_admin = True
    if not admin.password_hash or not admin.has_password(password):
        admin.set_password(password)


def _user(email: str, name: str) -> User:
    user = db.session.scalar(sa.select(User).where(User.email == email))
    if user is None:
        # No password matches an empty hash, so the account cannot be used until one is set.
        user = User(email=email, name=name, password_hash="")
        db.session.add(user)
    return user


def _products() -> int:
    if db.session.scalar(sa.select(sa.func.count(Product.id))):
        return 0
    made = [
        Product(
            sku=f"SHOP-{number:04}",
            name=name,
            category=category,
            price_cents=cents,
            stock=number % 40,
        )
        for number, (name, category, cents) in enumerate(itertools.islice(_catalogue(), 60), 1)
    ]
    db.session.add_all(made)
    return len(made)


def _orders() -> int:
    if db.session.scalar(sa.select(sa.func.count(Order.id))):
        return 0
    customer = _user(CUSTOMER_EMAIL, "Carl Customer")
    products = db.session.scalars(sa.select(Product).order_by(Product.id).limit(20)).all()
    dice = random.Random(1)
    for number in range(SAMPLE_ORDERS):
        product = dice.choice(products)
        order = Order(
            user=customer,
            product=product,
            quantity=dice.randint(1, 3),
            unit_price_cents=product.price_cents,
            created_at=now() - dt.timedelta(hours=17 * (SAMPLE_ORDERS - number)),
        )
        db.session.add(order)
    return SAMPLE_ORDERS


def _photos() -> int:
    """Save the photos one by one, each with the job that makes its thumbnails."""
    if db.session.scalar(sa.select(sa.func.count(Product.photo))):
        return 0
    first = sa.select(Product).order_by(Product.name, Product.id).limit(SAMPLE_PHOTOS)
    products = db.session.scalars(first).all()
    for product in products:
        save_photo(product, draw_photo(product.sku))
    return len(products)


def _catalogue() -> Iterator[tuple[str, str, int]]:
    """An endless sequence of products as name, category and price in cents; always the same."""
    dice = random.Random(2)
    while True:
        category = dice.choice(list(_THINGS))
        thing = dice.choice(_THINGS[category])
        name = f"{dice.choice(_ADJECTIVES)} {dice.choice(_MATERIALS)} {thing}"
        yield name, category, dice.randint(3, 120) * 100 - dice.choice((1, 5, 10, 50))
