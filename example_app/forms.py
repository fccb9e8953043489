"""The shop's forms. Flask-WTF adds a CSRF token to each, and checks it."""

from __future__ import annotations

from typing import Any

from flask_wtf import FlaskForm
from flask_wtf.file import FileAllowed, FileField, FileRequired
from wtforms import (
    BooleanField,
    DateField,
    EmailField,
    IntegerField,
    PasswordField,
    StringField,
    ValidationError,
)
from wtforms.validators import DataRequired, Email, EqualTo, InputRequired, Length, NumberRange

from . import photos


def _stripped(value: str | None) -> str:
    return (value or "").strip()


def _address(value: str | None) -> str:
    return _stripped(value).lower()


class LoginForm(FlaskForm):
    email = EmailField(
        "E-mail",
        filters=[_address],
        validators=[DataRequired(), Length(max=254)],
        render_kw={"autocomplete": "username"},
    )
    password = PasswordField(
        "Password",
        validators=[DataRequired(), Length(max=200)],
        render_kw={"autocomplete": "current-password"},
    )
    remember = BooleanField("Keep me signed in")


class RegistrationForm(FlaskForm):
    name = StringField(
        "Name",
        filters=[_stripped],
        validators=[DataRequired(), Length(max=100)],
        render_kw={"autocomplete": "name"},
    )
    email = EmailField(
        "E-mail",
        filters=[_address],
        validators=[DataRequired(), Length(max=254), Email()],
        render_kw={"autocomplete": "username"},
    )
    password = PasswordField(
        "Password",
        description="Ten characters or more.",
        validators=[DataRequired(), Length(min=10, max=200)],
        render_kw={"autocomplete": "new-password"},
    )
    repeated = PasswordField(
        "Password again",
        validators=[EqualTo("password", message="The two passwords differ.")],
        render_kw={"autocomplete": "new-password"},
    )

    def validate_name(self, field: Any) -> None:
        # The name appears in the greeting of receipts, where a line break would be wrong.
        if not field.data.isprintable():
            raise ValidationError("Control characters are not allowed.")


class OrderForm(FlaskForm):
    quantity = IntegerField(
        "Quantity", default=1, validators=[InputRequired(), NumberRange(min=1, max=100)]
    )


class UploadForm(FlaskForm):
    file = FileField(
        "CSV file",
        description="Columns: sku, name, category, price, stock. UTF-8, at most 5 MB.",
        validators=[FileRequired(), FileAllowed(["csv"], "Choose a file that ends in .csv.")],
        render_kw={"accept": ".csv,text/csv"},
    )


class PhotoForm(FlaskForm):
    file = FileField(
        "Photo",
        description="JPEG, PNG or WebP, at most 5 MB. It replaces the current photo.",
        validators=[
            FileRequired(),
            FileAllowed(["jpg", "jpeg", "png", "webp"], "Choose a .jpg, .png or .webp file."),
        ],
        render_kw={"accept": "image/jpeg,image/png,image/webp"},
    )

    def validate_file(self, field: Any) -> None:
        # FileAllowed checks only the file name, not the content.
        content = field.data.read()
        field.data.seek(0)
        try:
            photos.check(content)
        except photos.NotAPhoto as error:
            text = str(error)
            raise ValidationError(f"{text[0].upper()}{text[1:]}.") from error


class ReportForm(FlaskForm):
    since = DateField("From", validators=[DataRequired()])
    until = DateField("To", validators=[DataRequired()])

    def validate_until(self, field: Any) -> None:
        if self.since.data and field.data and field.data < self.since.data:
            raise ValidationError("The last day is before the first.")
