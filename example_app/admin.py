"""Pages for administrators: import, photos, reports, outbox and trouble.

Jobs are shown on the dashboard of flask-bgjobs.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from flask import Blueprint, Response, abort, flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user
from werkzeug.utils import secure_filename

from flask_bgjobs import Job

from . import photos, trouble
from .auth import admin_required
from .extensions import db
from .formats import job_url
from .forms import PhotoForm, ReportForm, UploadForm
from .jobs import build_sales_report, import_products, make_thumbnails
from .models import OutboxMail, Product, ProductUpload, Report, now
from .shop import PER_PAGE, ROW_ID, page_number

REPORT_DAYS = 30
TROUBLE = {"hang": trouble.hang, "stubborn": trouble.stubborn, "crash": trouble.crash}

blueprint = Blueprint("admin", __name__, url_prefix="/admin")


@blueprint.route("/imports", methods=["GET", "POST"])
@admin_required
def imports() -> ResponseReturnValue:
    form = UploadForm()
    if form.validate_on_submit():
        upload = start_import(form.file.data.filename, form.file.data.read(), current_user.get_id())
        return redirect(url_for("admin.show_import", upload_id=upload.id))
    newest = sa.select(ProductUpload).order_by(ProductUpload.id.desc())
    page = db.paginate(newest, page=page_number(), per_page=PER_PAGE, error_out=False)
    return render_template("admin/imports.html", form=form, page=page)


@blueprint.get(f"/imports/<{ROW_ID}:upload_id>")
@admin_required
def show_import(upload_id: int) -> str:
    upload = db.get_or_404(ProductUpload, upload_id)
    return render_template("admin/import.html", upload=upload, job=job_of(upload.job_id))


@blueprint.route(f"/products/<{ROW_ID}:product_id>/photo", methods=["GET", "POST"])
@admin_required
def photo(product_id: int) -> ResponseReturnValue:
    product = db.get_or_404(Product, product_id)
    form = PhotoForm()
    if form.validate_on_submit():
        save_photo(product, form.file.data.read(), current_user.get_id())
        return redirect(url_for("admin.photo", product_id=product.id))
    job = job_of(product.photo_job_id)
    return render_template("admin/photo.html", product=product, form=form, job=job)


@blueprint.route("/reports", methods=["GET", "POST"])
@admin_required
def reports() -> ResponseReturnValue:
    today = now().date()
    form = ReportForm(since=today - dt.timedelta(days=REPORT_DAYS), until=today)
    if form.validate_on_submit():
        report = start_report(form.since.data, form.until.data, current_user.get_id())
        flash(f"Report {report.id} is being built.", "success")
        return redirect(url_for("admin.reports"))
    newest = sa.select(Report).order_by(Report.id.desc())
    page = db.paginate(newest, page=page_number(), per_page=PER_PAGE, error_out=False)
    jobs = {report.id: job_of(report.job_id) for report in page}
    return render_template("admin/reports.html", form=form, page=page, jobs=jobs)


@blueprint.get(f"/reports/<{ROW_ID}:report_id>.csv")
@admin_required
def download_report(report_id: int) -> Response:
    report = db.get_or_404(Report, report_id)
    if report.content is None:
        abort(404, "The report is not built yet.")
    name = f"sales-{report.since}-{report.until}.csv"
    return Response(
        report.content,
        mimetype="text/csv",
        headers={"Content-Disposition": f"attachment; filename={name}"},
    )


@blueprint.get("/outbox")
@admin_required
def outbox() -> str:
    newest = sa.select(OutboxMail).order_by(OutboxMail.id.desc())
    page = db.paginate(newest, page=page_number(), per_page=PER_PAGE, error_out=False)
    return render_template("admin/outbox.html", page=page)


@blueprint.get("/trouble")
@admin_required
def show_trouble() -> str:
    return render_template("admin/trouble.html", jobs=TROUBLE)


@blueprint.post(f"/trouble/<any({', '.join(TROUBLE)}):name>")
@admin_required
def start_trouble(name: str) -> ResponseReturnValue:
    # The queue is set by the decorators, so this page cannot send these jobs to a thread.
    job = TROUBLE[name].using(owner=current_user.get_id(), tags=["trouble"]).enqueue()
    return redirect(job_url(job.id))


def start_import(filename: str, content: bytes, owner: str | None = None) -> ProductUpload:
    """Save an upload, and enqueue the job that imports it in the same transaction."""
    upload = ProductUpload(filename=secure_filename(filename)[-200:] or "products.csv")
    upload.content = content
    db.session.add(upload)
    db.session.flush()
    job = import_products.using(owner=owner, tags=["import"]).enqueue(upload.id)
    upload.job_id = job.id
    db.session.commit()
    return upload


def start_report(since: dt.date, until: dt.date, owner: str | None = None) -> Report:
    """Save an empty report, and enqueue the job that builds it in the same transaction.

    The reports of several people take turns, so that hundreds of reports for one person do not
    delay those of the others.
    """
    report = Report(since=since, until=until)
    db.session.add(report)
    db.session.flush()
    using = build_sales_report.using(owner=owner, tags=["report"], fair=owner or "nobody")
    job = using.enqueue(report.id)
    report.job_id = job.id
    db.session.commit()
    return report


def save_photo(product: Product, content: bytes, owner: str | None = None) -> None:
    """Save a product's new photo, and enqueue the job that makes its thumbnails in the same
    transaction.

    :param content: the uploaded file, already checked by :func:`example_app.photos.check`.
    """
    name = photos.keep(content)
    try:
        replaced = _set_photo(product, name, owner)
    except BaseException:
        photos.remove(name)
        raise
    if replaced is not None:
        photos.remove(replaced)


def _set_photo(product: Product, name: str, owner: str | None) -> str | None:
    # Locked, so that the second of two simultaneous uploads finds and removes the first.
    db.session.refresh(product, with_for_update=True)
    replaced = product.photo
    product.photo, product.thumbnails_at = name, None
    db.session.flush()
    job = make_thumbnails.using(owner=owner, tags=["photo"]).enqueue(product.id, name)
    product.photo_job_id = job.id
    db.session.commit()
    return replaced


def job_of(job_id: int | None) -> Job | None:
    """The job with this id, or ``None`` if it has been pruned."""
    return None if job_id is None else db.session.get(Job, job_id)
