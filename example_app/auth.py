"""Registration, login, and access to the dashboard."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import sqlalchemy as sa
from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required, login_user, logout_user
from werkzeug.security import check_password_hash, generate_password_hash

from flask_bgjobs import Job

from .extensions import bgjobs, db, login_manager
from .forms import LoginForm, RegistrationForm
from .models import User

P = ParamSpec("P")
R = TypeVar("R")

blueprint = Blueprint("auth", __name__, url_prefix="/auth")


@bgjobs.authorize_dashboard
def may_use_dashboard(action: str, job: Job | None) -> bool:
    """Allow everything to administrators, and nothing to other users."""
    return bool(current_user.is_authenticated and current_user.is_admin)


@bgjobs.identify_visitor
def name_for_the_audit() -> str:
    """The email address, which says more in the audit trail than the id of an account."""
    return str(current_user.email)


def admin_required(view: Callable[P, R]) -> Callable[P, R]:
    """Restrict a view to administrators. Other users get a 403; visitors have to sign in."""

    @login_required
    @functools.wraps(view)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not current_user.is_admin:
            abort(403)
        return view(*args, **kwargs)

    return guarded


@login_manager.user_loader
def load_user(user_id: str) -> User | None:
    return db.session.get(User, int(user_id))


@blueprint.route("/register", methods=["GET", "POST"])
def register() -> ResponseReturnValue:
    form = RegistrationForm()
    if form.validate_on_submit():
        user = User(name=form.name.data, email=form.email.data)
        user.set_password(form.password.data)
        if _save_new(user):
            login_user(user)
            flash(f"Welcome, {user.name}.", "success")
            return redirect(url_for("shop.products"))
        form.email.errors = ["There is an account with this address. Sign in instead."]
    return render_template("auth/register.html", form=form)


@blueprint.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    form = LoginForm()
    if form.validate_on_submit():
        user = _user_with(form.email.data, form.password.data)
        if user is not None:
            login_user(user, remember=form.remember.data)
            return redirect(_safe_next())
        form.password.errors = ["E-mail or password is wrong."]
    return render_template("auth/login.html", form=form)


@blueprint.post("/logout")
def logout() -> ResponseReturnValue:
    logout_user()
    flash("You are signed out.", "info")
    return redirect(url_for("shop.products"))


def _save_new(user: User) -> bool:
    db.session.add(user)
    try:
        db.session.commit()
    except sa.exc.IntegrityError:
        # Checking beforehand whether the address is taken would be a race with other requests.
        db.session.rollback()
        return False
    return True


@functools.cache
def _dummy_hash() -> str:
    return generate_password_hash("")


def _user_with(email: str, password: str) -> User | None:
    user = db.session.scalar(sa.select(User).where(User.email == email))
    # Always checked, so that the response time does not reveal whether the account exists.
    right = check_password_hash(user.password_hash if user else _dummy_hash(), password)
    return user if user is not None and right else None


def _safe_next() -> str:
    target = request.args.get("next", "")
    return target if is_local(target) else url_for("shop.products")


def is_local(target: str) -> bool:
    """Whether a redirect to ``target`` stays on this site."""
    # Browsers read a backslash as a slash and drop control characters and spaces.
    if not target.startswith("/") or target[1:2] in ("/", "\\") or not target.isprintable():
        return False
    try:
        parts = urlsplit(target)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc
