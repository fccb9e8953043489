"""What administrators see: import, reports and outbox. The jobs have a dashboard of their own."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from flask import Blueprint, Response, abort, flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user
from werkzeug.utils import secure_filename

from flask_bgjobs import Job

from .auth import admin_required
from .extensions import db
from .forms import ReportForm, UploadForm
from .jobs import build_sales_report, import_products
from .models import OutboxMail, ProductUpload, Report, now
from .shop import PER_PAGE, ROW_ID, page_number

REPORT_DAYS = 30

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
    return render_template("admin/import.html", upload=upload, job=job_of(upload))


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
    jobs = {report.id: job_of(report) for report in page}
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


def start_import(filename: str, content: bytes, owner: str | None = None) -> ProductUpload:
    """The upload, saved together with the job that will import it."""
    upload = ProductUpload(filename=secure_filename(filename)[-200:] or "products.csv")
    upload.content = content
    db.session.add(upload)
    db.session.flush()
    job = import_products.using(owner=owner, tags=["import"]).enqueue(upload.id)
    upload.job_id = job.id
    db.session.commit()
    return upload


def start_report(since: dt.date, until: dt.date, owner: str | None = None) -> Report:
    """The empty report, saved together with the job that will fill it."""
    report = Report(since=since, until=until)
    db.session.add(report)
    db.session.flush()
    job = build_sales_report.using(owner=owner, tags=["report"]).enqueue(report.id)
    report.job_id = job.id
    db.session.commit()
    return report


def job_of(row: ProductUpload | Report) -> Job | None:
    """The job that works on ``row``; ``None`` once it was pruned."""
    return None if row.job_id is None else db.session.get(Job, row.job_id)
