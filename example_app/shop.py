"""Pages for visitors and customers: products and orders."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from flask import (
    Blueprint,
    Response,
    abort,
    flash,
    redirect,
    render_template,
    request,
    send_from_directory,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required

from flask_bgjobs import Job, run_background_job

from . import photos
from .extensions import db
from .forms import OrderForm
from .jobs import send_receipt, sync_stock
from .models import Order, Product

PER_PAGE = 24
MAX_PAGE = 10_000
ROW_ID = "int(max=2147483647)"
"""URL converter for ids. Larger numbers are never ids, and a database could refuse them."""

PHOTO_SECONDS = 365 * 24 * 3600

blueprint = Blueprint("shop", __name__)


@blueprint.get("/")
def products() -> str:
    query = request.args.get("q", "").strip()[:100]
    # Products with a photo come first.
    found = sa.select(Product).order_by(Product.photo.is_(None), Product.name, Product.id)
    if query:
        matches = (Product.name, Product.sku, Product.category)
        found = found.where(sa.or_(*(m.icontains(query, autoescape=True) for m in matches)))
    page = db.paginate(found, page=page_number(), per_page=PER_PAGE, error_out=False)
    being_made = photos_being_made(page.items)
    return render_template("shop/products.html", page=page, query=query, being_made=being_made)


def page_number() -> int:
    """The requested page number, from 1 to ``MAX_PAGE``; invalid values mean page 1."""
    number = request.args.get("page", 1, type=int)
    return min(max(number, 1), MAX_PAGE)


@blueprint.get(f"/products/<{ROW_ID}:product_id>")
def product(product_id: int) -> str:
    found = db.get_or_404(Product, product_id)
    return _product_page(found, OrderForm())


def _product_page(product: Product, form: OrderForm) -> str:
    being_made = photos_being_made([product])
    return render_template("shop/product.html", product=product, form=form, being_made=being_made)


@blueprint.get("/photos/<name>-<int:size>.webp")
def thumbnail(name: str, size: int) -> Response:
    # Each photo has its own name, so browsers may cache this one.
    file = photos.thumbnail_name(name, size)
    return send_from_directory(photos.thumbnail_folder(), file, max_age=PHOTO_SECONDS)


def photos_being_made(products: Sequence[Product]) -> set[int]:
    """The ids of the products whose photos are still being processed."""
    missing = {p.photo_job_id: p.id for p in products if p.photo and p.thumbnails_at is None}
    if not missing:
        return set()
    jobs = db.session.scalars(sa.select(Job).where(Job.id.in_(missing)))
    return {missing[job.id] for job in jobs if not job.is_finished}


@blueprint.post(f"/products/<{ROW_ID}:product_id>/order")
@login_required
def order(product_id: int) -> ResponseReturnValue:
    found = db.get_or_404(Product, product_id)
    form = OrderForm()
    if not form.validate_on_submit():
        return _product_page(found, form), 400
    if not _take_from_stock(found, form.quantity.data):
        db.session.rollback()
        flash("There are not that many left.", "warning")
        return redirect(url_for("shop.product", product_id=product_id))
    placed = _place_order(found, form.quantity.data)
    flash(f"Thank you. Order {placed.id} is placed, and its receipt is on the way.", "success")
    return redirect(url_for("shop.orders"))


def _take_from_stock(product: Product, quantity: int) -> bool:
    # A single statement, so that two customers cannot both buy the last item.
    taken = db.session.execute(
        sa.update(Product)
        .where(Product.id == product.id, Product.stock >= quantity)
        .values(stock=Product.stock - quantity)
    )
    return bool(taken.rowcount)


def _place_order(product: Product, quantity: int) -> Order:
    order = Order(
        user=current_user._get_current_object(),
        product=product,
        quantity=quantity,
        unit_price_cents=product.price_cents,
    )
    db.session.add(order)
    db.session.flush()
    # The session holds uncommitted writes, so the job joins their transaction: every order gets its
    # receipt, and an order that is rolled back gets none.
    send_receipt.using(owner=current_user.get_id(), tags=["receipt"]).enqueue(order.id)
    sync_stock.enqueue(product.id)
    db.session.commit()
    return order


@blueprint.get("/orders")
@login_required
def orders() -> str:
    mine = sa.select(Order).where(Order.user_id == current_user.id).order_by(Order.id.desc())
    page = db.paginate(mine, page=page_number(), per_page=PER_PAGE, error_out=False)
    return render_template("shop/orders.html", page=page)


@blueprint.get("/test-background-job")
@login_required
def test_background_job() -> str:
    """Enqueue a job by its name.

    This is deliberately a GET that changes data, so that it can be opened in the address bar to
    check whether a worker runs.
    """
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        abort(403)
    job = run_background_job(
        "example_app.jobs.SampleJob", "execute", ["Hello from the shop"], retries=3
    )
    return render_template("shop/test_job.html", job=job)
