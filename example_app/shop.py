"""What every visitor sees: products and orders."""

from __future__ import annotations

import sqlalchemy as sa
from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required

from flask_bgjobs import run_background_job

from .extensions import db
from .forms import OrderForm
from .jobs import send_receipt
from .models import Order, Product

PER_PAGE = 24
MAX_PAGE = 10_000
ROW_ID = "int(max=2147483647)"
"""Ids in addresses: larger ones are no rows, and databases would refuse to compare them."""

blueprint = Blueprint("shop", __name__)


@blueprint.get("/")
def products() -> str:
    query = request.args.get("q", "").strip()[:100]
    found = sa.select(Product).order_by(Product.name, Product.id)
    if query:
        matches = (Product.name, Product.sku, Product.category)
        found = found.where(sa.or_(*(m.icontains(query, autoescape=True) for m in matches)))
    page = db.paginate(found, page=page_number(), per_page=PER_PAGE, error_out=False)
    return render_template("shop/products.html", page=page, query=query)


def page_number() -> int:
    """The page asked for, from 1; nonsense is page 1, and more than exists is clamped."""
    number = request.args.get("page", 1, type=int)
    return min(max(number, 1), MAX_PAGE)


@blueprint.get(f"/products/<{ROW_ID}:product_id>")
def product(product_id: int) -> str:
    found = db.get_or_404(Product, product_id)
    return render_template("shop/product.html", product=found, form=OrderForm())


@blueprint.post(f"/products/<{ROW_ID}:product_id>/order")
@login_required
def order(product_id: int) -> ResponseReturnValue:
    found = db.get_or_404(Product, product_id)
    form = OrderForm()
    if not form.validate_on_submit():
        return render_template("shop/product.html", product=found, form=form), 400
    if not _take_from_stock(found, form.quantity.data):
        db.session.rollback()
        flash("There are not so many left.", "warning")
        return redirect(url_for("shop.product", product_id=product_id))
    placed = _place_order(found, form.quantity.data)
    flash(f"Thank you. Order {placed.id} is placed and its receipt is on the way.", "success")
    return redirect(url_for("shop.orders"))


def _take_from_stock(product: Product, quantity: int) -> bool:
    # One statement, so that two buyers cannot both get the last piece.
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
    # The session holds uncommitted writes, so the job is part of the same transaction: no
    # order without its receipt, and no receipt for an order that was rolled back.
    send_receipt.using(owner=current_user.get_id(), tags=["receipt"]).enqueue(order.id)
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

    A GET that changes something, on purpose: it is for typing into the address bar once, to
    see whether a worker runs.
    """
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        abort(403)
    job = run_background_job(
        "example_app.jobs.SampleJob", "execute", ["Hello from the shop"], retries=3
    )
    return render_template("shop/test_job.html", job=job)
