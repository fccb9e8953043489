"""The example shop. Its jobs run in the thread of the test."""

from __future__ import annotations

import datetime as dt
import io
import re
import shutil
import socketserver
import threading
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask_migrate
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image, ImageDraw
from werkzeug.security import generate_password_hash
from werkzeug.test import TestResponse

from example_app import create_app, photos, samples, trouble
from example_app.auth import is_local
from example_app.drawing import draw_photo
from example_app.extensions import bgjobs, db
from example_app.models import Order, OutboxMail, Product, ProductUpload, Report, User, now
from flask_bgjobs import Job, JobStatus
from flask_bgjobs.flow.limits.keeper import admit_all
from flask_bgjobs.state import state_of
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.registration import register

pytestmark = pytest.mark.slow

PASSWORD = "correct horse battery"
FAST_HASH = "pbkdf2:sha256:1"
"""A safe hash takes longer than the rest of a test."""
CSV_HEAD = "sku,name,category,price,stock\n"

MakeShop = Callable[..., Flask]


# Not named `app`: pytest-flask would keep a request context open around every test, and all
# requests of the test would share one current_user.
@pytest.fixture
def make_shop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_shop: Path
) -> Iterator[MakeShop]:
    for name in ("SHOP_DATABASE_URL", "SHOP_SMTP_HOST", "SHOP_ADMIN_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHOP_INSTANCE_PATH", str(tmp_path / "instance"))
    shops: list[Flask] = []
    instance = tmp_path / "instance"
    instance.mkdir()

    def make(*, tables: bool = True, **overrides: Any) -> Flask:
        app = create_app({"TESTING": True, "WTF_CSRF_ENABLED": False, **overrides})
        shops.append(app)
        if tables and "SQLALCHEMY_DATABASE_URI" in overrides:
            _create_tables(app)
        elif tables and not (instance / "shop.sqlite").exists():
            shutil.copy(prepared_shop, instance / "shop.sqlite")
        return app

    yield make
    for app in shops:
        with app.app_context():
            db.session.remove()
            db.engine.dispose()
            app.extensions["bgjobs"].store.dispose()


def _create_tables(app: Flask) -> None:
    with app.app_context():
        db.create_all()


@pytest.fixture(scope="module")
def prepared_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the shop's tables, to copy: creating them takes longer than a test."""
    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_INSTANCE_PATH", str(folder))
        app = create_app({"TESTING": True})
    _create_tables(app)
    with app.app_context():
        db.engine.dispose()
        app.extensions["bgjobs"].store.dispose()
    return folder / "shop.sqlite"


@pytest.fixture
def shop(make_shop: MakeShop) -> Flask:
    return make_shop()


def add_user(shop: Flask, email: str, *, is_admin: bool = False) -> None:
    with shop.app_context():
        user = User(email=email, name="Sam Someone", is_admin=is_admin)
        user.password_hash = generate_password_hash(PASSWORD, FAST_HASH)
        db.session.add(user)
        db.session.commit()


def add_product(shop: Flask, sku: str = "A-1", name: str = "Blue vase", stock: int = 5) -> int:
    with shop.app_context():
        product = Product(sku=sku, name=name, price_cents=1250, stock=stock)
        db.session.add(product)
        db.session.commit()
        return product.id


def signed_in(
    shop: Flask, email: str = "sam@example.com", *, is_admin: bool = False
) -> FlaskClient:
    add_user(shop, email, is_admin=is_admin)
    client = shop.test_client()
    answer = client.post("/auth/login", data={"email": email, "password": PASSWORD})
    assert answer.status_code == 302
    return client


def upload(client: FlaskClient, text: str, filename: str = "products.csv") -> TestResponse:
    file = (io.BytesIO(text.encode()), filename)
    return client.post("/admin/imports", data={"file": file})


def rows(shop: Flask, model: type[Any]) -> list[Any]:
    with shop.app_context():
        return list(db.session.scalars(sa.select(model).order_by(model.id)))


def statuses(shop: Flask) -> list[str]:
    return [entry.status for entry in drain(shop)]


class TestAccounts:
    def test_registration_signs_in_and_login_works_afterwards(self, shop: Flask) -> None:
        """A registration signs the user in, and the user can sign in again with the password."""
        form = {"name": "Kim", "email": " Kim@Example.com ", "password": PASSWORD}
        client = shop.test_client()
        answer = client.post(
            "/auth/register", data={**form, "repeated": PASSWORD}, follow_redirects=True
        )
        assert "Welcome, Kim." in answer.text
        assert "Sign out" in client.get("/").text
        client.post("/auth/logout")
        assert "Sign out" not in client.get("/").text
        client.post("/auth/login", data={"email": "kim@example.com", "password": PASSWORD})
        assert "Sign out" in client.get("/").text

    def test_password_is_stored_as_a_hash(self, shop: Flask) -> None:
        """The database contains only a hash of the password."""
        form = {"name": "Kim", "email": "kim@example.com", "password": PASSWORD}
        shop.test_client().post("/auth/register", data={**form, "repeated": PASSWORD})
        (user,) = rows(shop, User)
        assert user.password_hash.startswith("scrypt:")
        assert PASSWORD not in user.password_hash

    def test_address_can_be_registered_once(self, shop: Flask) -> None:
        """A second registration with the same address, in any case, is refused."""
        add_user(shop, "sam@example.com")
        form = {"name": "Sam", "email": "SAM@example.com", "password": PASSWORD}
        answer = shop.test_client().post("/auth/register", data={**form, "repeated": PASSWORD})
        assert "There is an account with this address" in answer.text
        assert len(rows(shop, User)) == 1

    @pytest.mark.parametrize(
        ("email", "password"),
        [("sam@example.com", "wrong password"), ("nobody@example.com", PASSWORD)],
    )
    def test_wrong_login_is_refused(self, shop: Flask, email: str, password: str) -> None:
        """A wrong password and an unknown address give the same answer."""
        add_user(shop, "sam@example.com")
        answer = shop.test_client().post("/auth/login", data={"email": email, "password": password})
        assert "E-mail or password is wrong." in answer.text

    def test_login_leads_to_requested_page(self, shop: Flask) -> None:
        """After the login, the user is redirected to the requested page."""
        add_user(shop, "sam@example.com")
        client = shop.test_client()
        login = client.get("/orders").location
        answer = client.post(login, data={"email": "sam@example.com", "password": PASSWORD})
        assert answer.location == "/orders"

    @pytest.mark.parametrize(
        "target",
        [
            "https://evil.example/",
            "//evil.example/",
            "/\\evil.example",
            "/\t/evil.example",
            "javascript:alert(1)",
            "evil",
            "",
            "/\n/evil.example",
        ],
    )
    def test_login_redirects_only_to_own_site(self, target: str) -> None:
        """Addresses of other sites are not local."""
        assert not is_local(target)

    def test_forms_without_a_token_are_refused(self, make_shop: MakeShop) -> None:
        """A form without a CSRF token changes nothing."""
        shop = make_shop(WTF_CSRF_ENABLED=True)
        form = {"name": "Kim", "email": "kim@example.com", "password": PASSWORD}
        answer = shop.test_client().post("/auth/register", data={**form, "repeated": PASSWORD})
        assert answer.status_code == 400
        assert rows(shop, User) == []


class TestProducts:
    def test_list_is_searched_and_paged(self, shop: Flask) -> None:
        """The list has pages, and shows only products that match the search."""
        for number in range(30):
            add_product(shop, f"V-{number}", f"Vase {number:02}")
        add_product(shop, "L-1", "100% linen cloth")
        client = shop.test_client()
        assert "Page 1 of 2" in client.get("/").text
        second = client.get("/?page=2&q=vase").text
        assert "Vase 29" in second
        assert "linen" not in second
        assert "1 product " in re.sub(r"\s+", " ", client.get("/?q=100%25+l").text)
        assert "Nothing matches" in client.get("/?q=V_29").text

    @pytest.mark.parametrize(
        "address",
        [
            "/?page=0",
            "/?page=-3",
            "/?page=99999999999999999999",
            "/?page=x",
            "/?q=%00&page=1",
            "/?page=1&_external=1&_scheme=x&endpoint=y",
        ],
    )
    def test_invalid_queries_are_answered(self, shop: Flask, address: str) -> None:
        """The list answers any page number and search with 200."""
        for number in range(30):
            add_product(shop, f"V-{number}")
        assert shop.test_client().get(address).status_code == 200

    def test_unknown_products_are_not_found(self, shop: Flask) -> None:
        """Missing and impossible ids are a 404."""
        client = shop.test_client()
        assert client.get("/products/7").status_code == 404
        assert client.get(f"/products/{10**30}").status_code == 404


class TestOrders:
    def test_order_creates_a_receipt(self, shop: Flask) -> None:
        """An order reduces the stock, and its job writes the receipt to the outbox."""
        product_id = add_product(shop)
        client = signed_in(shop)
        client.post(f"/products/{product_id}/order", data={"quantity": 2})
        assert "on its way" in client.get("/orders").text
        assert statuses(shop) == [JobStatus.COMPLETED]
        (mail,) = rows(shop, OutboxMail)
        assert mail.recipient == "sam@example.com"
        assert "25.00 €" in mail.body
        assert mail.sent_at is not None
        assert rows(shop, Product)[0].stock == 3
        assert "on its way" not in client.get("/orders").text

    @pytest.mark.on("postgresql", "mysql")
    def test_order_on_a_server_creates_a_receipt(
        self, make_shop: MakeShop, database_url: str
    ) -> None:
        """On a database server, an order creates a receipt as well."""
        shop = make_shop(SQLALCHEMY_DATABASE_URI=database_url)
        product_id = add_product(shop, name="Blaue Eule 🦉")
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 2})
        assert statuses(shop) == [JobStatus.COMPLETED]
        (mail,) = rows(shop, OutboxMail)
        assert "Eule 🦉" in mail.body

    def test_receipt_job_is_idempotent(self, shop: Flask) -> None:
        """A receipt job that runs again does not send a second mail."""
        product_id = add_product(shop)
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 1})
        from example_app.jobs import send_receipt

        with shop.app_context():
            order_id = rows(shop, Order)[0].id
            send_receipt.enqueue(order_id)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert len(rows(shop, OutboxMail)) == 1
        assert sorted(job.result for job in rows(shop, Job) if job.result) == [
            "already sent",
            "outbox: sam@example.com",
        ]

    def test_order_and_job_are_one_transaction(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the order cannot be committed, its job is not enqueued."""
        product_id = add_product(shop)
        client = signed_in(shop)

        def refuse(*_: object) -> None:
            raise RuntimeError("the disk is full")

        with shop.app_context():
            sa.event.listen(db.session, "before_commit", refuse)
        try:
            with pytest.raises(RuntimeError, match="disk is full"):
                client.post(f"/products/{product_id}/order", data={"quantity": 1})
        finally:
            sa.event.remove(db.session, "before_commit", refuse)
        assert rows(shop, Order) == []
        assert rows(shop, Job) == []
        assert rows(shop, Product)[0].stock == 5

    @pytest.mark.parametrize("quantity", ["6", "0", "-1", "101", "x", ""])
    def test_impossible_quantities_are_refused(self, shop: Flask, quantity: str) -> None:
        """A quantity that is invalid, or exceeds the stock, places no order."""
        product_id = add_product(shop, stock=5)
        client = signed_in(shop)
        client.post(f"/products/{product_id}/order", data={"quantity": quantity})
        assert rows(shop, Order) == []
        assert rows(shop, Product)[0].stock == 5

    def test_order_needs_a_login(self, shop: Flask) -> None:
        """Without a login, an order is redirected to the login page."""
        product_id = add_product(shop)
        answer = shop.test_client().post(f"/products/{product_id}/order", data={"quantity": 1})
        assert answer.location.startswith("/auth/login")
        assert rows(shop, Order) == []

    def test_users_see_only_their_own_orders(self, shop: Flask) -> None:
        """A user does not see the orders of other users."""
        product_id = add_product(shop)
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 1})
        other = signed_in(shop, "kim@example.com")
        assert "No orders yet" in other.get("/orders").text


class MailServer(socketserver.ThreadingTCPServer):
    """A minimal SMTP server that answers DATA with ``answer``."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), SmtpHandler)
        self.answer = answer
        self.mails: list[str] = []


class SmtpHandler(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                self._take()
            elif verb == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            else:
                self.wfile.write(b"250 ok\r\n")

    def _take(self) -> None:
        lines = list(iter(self.rfile.readline, b".\r\n"))
        if self.server.answer.startswith(b"250"):
            self.server.mails.append(b"".join(lines).decode())
        self.wfile.write(self.server.answer + b"\r\n")


@pytest.fixture
def mail_server() -> Iterator[Callable[[bytes], MailServer]]:
    running: list[tuple[MailServer, threading.Thread]] = []

    def start(answer: bytes) -> MailServer:
        server = MailServer(answer)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


class TestMail:
    def order_with(self, make_shop: MakeShop, server: MailServer) -> Flask:
        host, port = server.server_address
        shop = make_shop(SHOP_SMTP_HOST=host, SHOP_SMTP_PORT=port)
        product_id = add_product(shop, name="Vase für Blumen")
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 1})
        return shop

    def test_receipt_is_sent(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """With a mail server configured, the receipt is sent once."""
        server = mail_server(b"250 taken")
        shop = self.order_with(make_shop, server)
        assert statuses(shop) == [JobStatus.COMPLETED]
        (mail,) = server.mails
        assert "To: sam@example.com" in mail
        assert "Message-ID: <receipt-1@example.com>" in mail
        assert rows(shop, OutboxMail)[0].transport == "smtp"

    def test_temporary_refusal_is_retried(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """A temporary refusal uses a retry."""
        shop = self.order_with(make_shop, mail_server(b"451 come back later"))
        assert statuses(shop) == [JobStatus.RETRYING]
        assert rows(shop, OutboxMail)[0].sent_at is None

    def test_permanent_refusal_is_not_retried(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """A permanent refusal fails the job at once."""
        shop = self.order_with(make_shop, mail_server(b"554 never"))
        assert statuses(shop) == [JobStatus.FAILED]

    def test_missing_server_is_retried(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """A refused connection uses a retry."""
        server = mail_server(b"250 taken")
        server.shutdown()
        server.server_close()
        shop = self.order_with(make_shop, server)
        assert statuses(shop) == [JobStatus.RETRYING]


class TestImport:
    def test_import_creates_updates_and_counts(self, shop: Flask) -> None:
        """The job creates and updates products by SKU, and counts invalid lines."""
        add_product(shop, "A-1", "Old name")
        admin = signed_in(shop, is_admin=True)
        text = (
            CSV_HEAD + "A-1,New name,Home,9.99,3\nB-2,Bowl,Kitchen,4,\nC-3,Cup,,free,1\n,x,,1,1\n"
        )
        page = upload(admin, text).location
        assert "waiting" in admin.get(page).text
        assert statuses(shop) == [JobStatus.COMPLETED]
        (job,) = rows(shop, Job)
        assert job.result == {"created": 1, "updated": 1, "unchanged": 0, "bad": 2}
        assert job.progress == 1
        assert {p.sku: (p.name, p.price_cents, p.stock) for p in rows(shop, Product)} == {
            "A-1": ("New name", 999, 3),
            "B-2": ("Bowl", 400, 0),
        }
        assert "completed" in admin.get(page).text

    def test_one_import_runs_at_a_time(self, shop: Flask) -> None:
        """A second import waits for the end of the first one."""
        admin = signed_in(shop, is_admin=True)
        for _ in range(2):
            upload(admin, CSV_HEAD + "B-2,Bowl,Kitchen,4,\n")
        store = state_of(shop).store
        register(state_of(shop), "one")
        admit_all(store)
        assert [job.status for job in rows(shop, Job)] == ["pending", "waiting"]

    def test_second_import_changes_nothing(self, shop: Flask) -> None:
        """A second import of the same file changes no product."""
        admin = signed_in(shop, is_admin=True)
        text = samples.product_csv(300).decode()
        upload(admin, text)
        upload(admin, text)
        drain(shop)
        first, second = (job.result for job in rows(shop, Job))
        assert first == {"created": 295, "updated": 0, "unchanged": 0, "bad": 5}
        assert second == {"created": 0, "updated": 0, "unchanged": 295, "bad": 5}

    def test_interrupted_import_continues(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next attempt continues an interrupted import, and counts no row twice."""
        admin = signed_in(shop, is_admin=True)
        upload(admin, samples.product_csv(300).decode())
        from example_app import jobs

        import_chunk, calls = jobs._import_chunk, []

        def fail_on_second_call(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise ConnectionError("the plug was pulled")
            import_chunk(*arguments)

        monkeypatch.setattr(jobs, "_import_chunk", fail_on_second_call)
        assert statuses(shop) == [JobStatus.RETRYING]
        assert rows(shop, ProductUpload)[0].rows_done == jobs.IMPORT_CHUNK
        shop.extensions["bgjobs"].store.retry([rows(shop, Job)[0].id])
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result == {"created": 295, "updated": 0, "unchanged": 0, "bad": 5}

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("name,price\nx,1\n", "lacks the columns sku"),
            ("", "lacks the columns sku, name, price"),
            ("\x00\x00", "lacks the columns"),
        ],
    )
    def test_file_without_columns_fails(self, shop: Flask, text: str, reason: str) -> None:
        """A file without the required columns fails the job at once, and the error names them."""
        admin = signed_in(shop, is_admin=True)
        page = upload(admin, text).location
        assert statuses(shop) == [JobStatus.FAILED]
        assert reason in rows(shop, Job)[0].error
        assert reason in admin.get(page).text

    @pytest.mark.parametrize(
        "row",
        [
            "A,Name,,NaN,1",
            "A,Name,,-1,1",
            "A,Name,,1e30,1",
            "A,Name,,1.005,1",
            "A,Name,,1,-1",
            "A,Name,,1,1.5",
            "A,Name,,1,²",
            "A,,,1,1",
            f"{'A' * 41},Name,,1,1",
            "A",
        ],
    )
    def test_invalid_line_is_counted_and_skipped(self, shop: Flask, row: str) -> None:
        """An invalid line is counted, and the lines after it are imported."""
        admin = signed_in(shop, is_admin=True)
        upload(admin, f"{CSV_HEAD}{row}\nB-2,Bowl,,4,1\n")
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result["bad"] == 1
        assert [product.sku for product in rows(shop, Product)] == ["B-2"]

    def test_other_and_large_files_are_refused(self, shop: Flask) -> None:
        """Only ``.csv`` files of limited size are accepted."""
        admin = signed_in(shop, is_admin=True)
        assert "ends in .csv" in upload(admin, "x", "products.exe").text
        large = admin.post(
            "/admin/imports",
            data=b"x" * (6 * 1024 * 1024),
            content_type="multipart/form-data; boundary=x",
        )
        assert large.status_code == 413
        assert rows(shop, Job) == []


def picture(
    kind: str = "PNG", size: tuple[int, int] = (600, 300), mode: str = "RGB", **options: Any
) -> bytes:
    """A picture with a red left half and a blue right half, if its mode has colours."""
    made = Image.new("RGB", size, "blue")
    ImageDraw.Draw(made).rectangle((0, 0, size[0] // 2, size[1]), fill="red")
    data = io.BytesIO()
    made.convert(mode).save(data, kind, **options)
    return data.getvalue()


def send_photo(
    client: FlaskClient, product_id: int, content: bytes, filename: str = "photo.png"
) -> TestResponse:
    file = (io.BytesIO(content), filename)
    return client.post(f"/admin/products/{product_id}/photo", data={"file": file})


def photo_files(shop: Flask) -> set[str]:
    """The names of all photo files."""
    folder = Path(shop.instance_path, "photos")
    return {path.name for path in folder.rglob("*") if path.is_file()}


def expected_files(name: str) -> set[str]:
    return {name, f"{name}-160.webp", f"{name}-480.webp"}


def thumbnail(client: FlaskClient, name: str, size: int) -> Image.Image:
    with client.get(f"/photos/{name}-{size}.webp") as answer:
        assert (answer.status_code, answer.mimetype) == (200, "image/webp")
        return Image.open(io.BytesIO(answer.data))


def black_png(size: tuple[int, int]) -> bytes:
    """A PNG that is a small file at any size of the picture."""
    data = io.BytesIO()
    Image.new("1", size).save(data, "PNG")
    return data.getvalue()


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


class TestPhotos:
    @pytest.mark.parametrize(
        ("kind", "filename"), [("JPEG", "a.jpg"), ("PNG", "a.PNG"), ("WEBP", "../a.webp")]
    )
    def test_upload_becomes_two_thumbnails(self, shop: Flask, kind: str, filename: str) -> None:
        """Pages say that the photo is being made until the job has made both sizes, and then show
        it."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        assert 'class="photo' not in admin.get("/").text
        page = send_photo(admin, product_id, picture(kind), filename).location
        for address in (page, "/", f"/products/{product_id}"):
            assert "Photo is being made" in admin.get(address).text
        assert statuses(shop) == [JobStatus.COMPLETED]
        (product,) = rows(shop, Product)
        for address, size in ((page, 480), ("/", 160), (f"/products/{product_id}", 480)):
            text = admin.get(address).text
            assert f"/photos/{product.photo}-{size}.webp" in text
            assert "being made" not in text
        visitor = shop.test_client()
        assert thumbnail(visitor, product.photo, 480).size == (480, 240)
        assert thumbnail(visitor, product.photo, 160).size == (160, 80)
        assert photo_files(shop) == expected_files(product.photo)

    def test_photo_job_uses_process_pool_and_reports_progress(self, shop: Flask) -> None:
        """The job's queue belongs to the process pool; the job has a timeout, progress and log
        lines."""
        product_id = add_product(shop)
        send_photo(signed_in(shop, is_admin=True), product_id, picture())
        drain(shop)
        (job,) = rows(shop, Job)
        assert shop.config["BGJOBS_QUEUE_POOLS"][job.queue] == "process"
        assert (job.timeout, job.retries, job.result) == (30, 1, "made")
        assert (job.progress, job.progress_note) == (1, "2 of 2 sizes")
        with shop.app_context():
            lines = db.session.scalars(sa.text("SELECT message FROM bgjobs_log ORDER BY id")).all()
        assert [re.sub(r"[\d,]+ bytes", "", line) for line in lines] == [
            "480 x 240 pixels, ",
            "160 x 80 pixels, ",
        ]

    def test_photo_is_rotated_and_metadata_removed(self, shop: Flask) -> None:
        """A photo is rotated by its EXIF orientation, and all metadata is removed."""
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was rotated
        exif[0x010F] = "Some Camera"
        exif.get_ifd(0x8825)[1] = "N"
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        content = picture("JPEG", exif=exif.tobytes(), icc_profile=b"x" * 200, comment=b"secret")
        assert b"Some Camera" in content
        send_photo(admin, product_id, content, "a.jpg")
        assert statuses(shop) == [JobStatus.COMPLETED]
        (product,) = rows(shop, Product)
        made = thumbnail(admin, product.photo, 480)
        assert made.size == (240, 480)
        top, bottom = (made.convert("RGB").getpixel((120, y)) for y in (20, 460))
        assert top[0] > 200 > bottom[0]
        assert not {"exif", "icc_profile", "xmp", "comment"} & set(made.info)
        assert not made.getexif()

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
    def test_all_png_modes_are_accepted(self, shop: Flask, mode: str) -> None:
        """PNGs with palettes, greys and transparency become thumbnails."""
        product_id = add_product(shop)
        send_photo(signed_in(shop, is_admin=True), product_id, picture(mode=mode))
        assert statuses(shop) == [JobStatus.COMPLETED]

    def test_cmyk_is_accepted(self, shop: Flask) -> None:
        """A CMYK JPEG becomes a thumbnail."""
        product_id = add_product(shop)
        content = picture("JPEG", mode="CMYK")
        send_photo(signed_in(shop, is_admin=True), product_id, content, "a.jpeg")
        assert statuses(shop) == [JobStatus.COMPLETED]

    def test_small_photo_is_not_enlarged(self, shop: Flask) -> None:
        """A photo smaller than a thumbnail keeps its size."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture(size=(20, 10)))
        drain(shop)
        assert thumbnail(admin, rows(shop, Product)[0].photo, 480).size == (20, 10)

    @pytest.mark.parametrize(
        ("content", "filename", "reason"),
        [
            (b"", "a.png", "not a JPEG, PNG or WebP picture"),
            (b"not a picture", "a.png", "not a JPEG, PNG or WebP picture"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png", "not a JPEG, PNG or WebP"),
            (picture("GIF"), "a.png", "not a JPEG, PNG or WebP picture"),
            (picture(), "a.gif", "Choose a .jpg, .png or .webp file."),
            (picture(), "a", "Choose a .jpg, .png or .webp file."),
            (damaged(picture("WEBP")), "a.webp", "not a JPEG, PNG or WebP picture"),
        ],
        ids=["empty", "text", "svg", "gif", "gif name", "no suffix", "damaged"],
    )
    def test_invalid_upload_is_refused(
        self, shop: Flask, content: bytes, filename: str, reason: str
    ) -> None:
        """An upload that is not a valid photo is answered with the reason, and creates no job and
        no file."""
        self.check_refusal(shop, content, filename, reason)

    @pytest.mark.parametrize("size", [(8_000, 5_001), (10_000, 10_000), (20_000, 10_000)])
    def test_large_picture_is_refused(self, shop: Flask, size: tuple[int, int]) -> None:
        """A picture with more than 40 million pixels is refused, however small its file is."""
        self.check_refusal(shop, black_png(size), "a.png", "more than 40 million pixels")

    def check_refusal(self, shop: Flask, content: bytes, filename: str, reason: str) -> None:
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        answer = send_photo(admin, product_id, content, filename)
        assert answer.status_code == 200
        assert reason in answer.text
        assert (rows(shop, Job), photo_files(shop)) == ([], set())
        assert rows(shop, Product)[0].photo is None

    def test_large_file_is_refused(self, shop: Flask) -> None:
        """A file larger than MAX_UPLOAD_BYTES is refused."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        large = admin.post(
            f"/admin/products/{product_id}/photo",
            data=b"x" * (6 * 1024 * 1024),
            content_type="multipart/form-data; boundary=x",
        )
        assert large.status_code == 413
        assert (rows(shop, Job), photo_files(shop)) == ([], set())

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_damaged_photo_fails_without_a_retry(self, shop: Flask, kind: str) -> None:
        """A truncated file fails the job without a retry, and the page shows the reason."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        page = send_photo(admin, product_id, damaged(picture(kind)), f"a.{kind.lower()}").location
        assert statuses(shop) == [JobStatus.FAILED]
        (job,) = rows(shop, Job)
        assert "the picture is damaged" in job.error
        assert "the picture is damaged" in admin.get(page).text
        assert "No photo" in admin.get("/").text

    def test_replaced_photo_is_removed(self, shop: Flask) -> None:
        """A new photo replaces the old one, whose files are deleted."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture())
        drain(shop)
        before = rows(shop, Product)[0].photo
        send_photo(admin, product_id, picture(size=(300, 600)))
        assert "Photo is being made" in admin.get("/").text
        assert admin.get(f"/photos/{before}-480.webp").status_code == 404
        drain(shop)
        after = rows(shop, Product)[0].photo
        assert photo_files(shop) == expected_files(after)
        assert thumbnail(admin, after, 480).size == (240, 480)

    def test_photo_replaced_before_its_job_leaves_no_file(self, shop: Flask) -> None:
        """If a photo is replaced before its job runs, the job completes and creates no file."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        for _ in range(2):
            send_photo(admin, product_id, picture())
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert [job.result for job in rows(shop, Job)] == ["photo was replaced", "made"]
        assert photo_files(shop) == expected_files(rows(shop, Product)[0].photo)

    def test_photo_replaced_during_its_job_leaves_no_file(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a photo is replaced while its job runs, the job deletes the files that it made."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture())
        make_thumbnails, calls = photos.make_thumbnails, []

        def replace_during_first_call(name: str) -> Iterator[photos.Thumbnail]:
            calls.append(name)
            made = list(make_thumbnails(name))
            if len(calls) == 1:
                send_photo(admin, product_id, picture())
            return iter(made)

        monkeypatch.setattr(photos, "make_thumbnails", replace_during_first_call)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert [job.result for job in rows(shop, Job)] == ["photo was replaced", "made"]
        assert photo_files(shop) == expected_files(rows(shop, Product)[0].photo)

    def test_photo_job_is_idempotent(self, shop: Flask) -> None:
        """A job that runs again makes the same files."""
        from example_app.jobs import make_thumbnails

        product_id = add_product(shop)
        send_photo(signed_in(shop, is_admin=True), product_id, picture())
        with shop.app_context():
            name = rows(shop, Product)[0].photo
            make_thumbnails.enqueue(product_id, name)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert photo_files(shop) == expected_files(name)

    def test_uncommitted_upload_leaves_no_file(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the product cannot be saved, no file and no job is created, and the old photo is
        kept."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture())
        drain(shop)
        kept = photo_files(shop)

        def refuse(*_: object) -> None:
            raise RuntimeError("the disk is full")

        with shop.app_context():
            sa.event.listen(db.session, "before_commit", refuse)
        try:
            with pytest.raises(RuntimeError, match="disk is full"):
                send_photo(admin, product_id, picture())
        finally:
            sa.event.remove(db.session, "before_commit", refuse)
        assert photo_files(shop) == kept == expected_files(rows(shop, Product)[0].photo)
        assert len(rows(shop, Job)) == 1

    def test_only_thumbnails_are_served(self, shop: Flask) -> None:
        """Uploads, other sizes and other files are a 404."""
        product_id = add_product(shop)
        client = signed_in(shop, is_admin=True)
        send_photo(client, product_id, picture())
        drain(shop)
        name = rows(shop, Product)[0].photo
        for address in (
            f"/photos/{name}",
            f"/photos/{name}-100.webp",
            f"/photos/..%2Fuploads%2F{name}",
            "/photos/..%2F..%2Fsecret_key-480.webp",
            "/photos/-480.webp",
        ):
            assert client.get(address).status_code == 404

    def test_sample_photos_are_valid(self) -> None:
        """The sample photos of ``seed`` are valid uploads, and always the same."""
        drawn = draw_photo("SHOP-0001")
        photos.check(drawn)
        assert drawn == draw_photo("SHOP-0001") != draw_photo("SHOP-0002")


class TestTrouble:
    @pytest.mark.parametrize("name", ["hang", "stubborn", "crash"])
    def test_page_enqueues_into_process_pool(self, shop: Flask, name: str) -> None:
        """The page enqueues each job into a queue of the process pool, and redirects to the job."""
        admin = signed_in(shop, is_admin=True)
        assert f"/admin/trouble/{name}" in admin.get("/admin/trouble").text
        answer = admin.post(f"/admin/trouble/{name}", data={"queue": "default"})
        (job,) = rows(shop, Job)
        assert answer.location == f"/jobs/job/{job.id}"
        assert job.target == f"example_app.trouble.{name}"
        assert shop.config["BGJOBS_QUEUE_POOLS"][job.queue] == "process"

    @pytest.mark.parametrize("job", [trouble.hang, trouble.stubborn, trouble.crash])
    def test_job_fails_outside_a_child_process(self, shop: Flask, job: Any) -> None:
        """In a thread of the worker, such a job fails at once."""
        with shop.app_context():
            job.using(queue="default").enqueue()
        assert statuses(shop) == [JobStatus.FAILED]
        assert "runs only in a child process" in rows(shop, Job)[0].error

    @pytest.mark.parametrize("address", ["/admin/trouble/hang", "/admin/trouble/mischief"])
    def test_only_administrators_can_start_jobs(self, shop: Flask, address: str) -> None:
        """A customer cannot start a job, and an unknown job cannot be started."""
        assert signed_in(shop).post(address).status_code in (403, 404)
        assert rows(shop, Job) == []


class TestReports:
    def test_report_is_built_and_downloaded(self, shop: Flask) -> None:
        """The job sums up the orders of the days, and the page offers the file."""
        product_id = add_product(shop, name='=HYPERLINK("x")')
        admin = signed_in(shop, is_admin=True)
        for quantity in (1, 2):
            admin.post(f"/products/{product_id}/order", data={"quantity": quantity})
        today = rows(shop, Order)[0].created_at.date().isoformat()
        admin.post("/admin/reports", data={"since": today, "until": today})
        (report,) = rows(shop, Report)
        address = f"/admin/reports/{report.id}.csv"
        assert admin.get(address).status_code == 404
        drain(shop)
        answer = admin.get(address)
        assert answer.mimetype == "text/csv"
        assert f"sales-{today}-{today}.csv" in answer.headers["Content-Disposition"]
        assert answer.text.splitlines() == [
            "sku,name,orders,pieces,revenue",
            'A-1,"\'=HYPERLINK(""x"")",2,3,37.50',
        ]
        assert address in admin.get("/admin/reports").text

    def test_days_in_the_wrong_order_are_refused(self, shop: Flask) -> None:
        """A report whose last day is before its first is refused."""
        admin = signed_in(shop, is_admin=True)
        answer = admin.post("/admin/reports", data={"since": "2026-02-02", "until": "2026-02-01"})
        assert "before the first" in answer.text
        assert rows(shop, Report) == []


class TestRecurringJobs:
    def test_nightly_report_is_of_the_day_before(self, shop: Flask) -> None:
        """The nightly job makes one report of the day before, also if it runs again."""
        with shop.app_context():
            job = bgjobs.schedules["report_last_day"].run_now()
            drain(shop)
            # As if its worker had died after the report was saved.
            db.session.execute(sa.update(Job).values(status=JobStatus.FAILED))
            db.session.execute(sa.update(Report).values(content="broken"))
            db.session.commit()
            state_of(shop).store.retry([job.id])
        day = job.meta["tick"].astimezone(zoneinfo.ZoneInfo("Europe/Berlin")).date()
        drain(shop)
        (report,) = rows(shop, Report)
        assert report.since == report.until == day - dt.timedelta(days=1)
        assert report.job_id == job.id
        with shop.app_context():
            assert (
                db.session.scalar(sa.select(Report.content)) == "sku,name,orders,pieces,revenue\n"
            )

    def test_old_uploads_are_discarded(self, shop: Flask) -> None:
        """The files of imports that finished a week ago are discarded, those of others are kept."""
        with shop.app_context():
            for days in (8, 6, None):
                ended = None if days is None else now() - dt.timedelta(days=days)
                upload = ProductUpload(filename=f"{days}.csv", content=b"x", finished_at=ended)
                db.session.add(upload)
            db.session.commit()
            bgjobs.schedules["discard_old_uploads"].run_now()
        (outcome,) = drain(shop)
        assert outcome.result == 1
        with shop.app_context():
            kept = sa.select(ProductUpload.filename).where(ProductUpload.content != b"")
            assert sorted(db.session.scalars(kept)) == ["6.csv", "None.csv"]


def test_stock_is_sent_once_after_several_orders(shop: Flask) -> None:
    """Orders within seconds have one job that sends the stock, which is not due yet."""
    product_id = add_product(shop)
    client = signed_in(shop)
    for _ in range(2):
        client.post(f"/products/{product_id}/order", data={"quantity": 1})
    (job,) = (job for job in rows(shop, Job) if job.target == "example_app.jobs.sync_stock")
    assert (job.status, job.parameters) == (JobStatus.SCHEDULED, [product_id])


class TestAccess:
    ADMIN_PAGES = ("/jobs/", "/admin/imports", "/admin/reports", "/admin/outbox", "/admin/trouble")

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_anonymous_visitors_are_redirected_to_login(self, shop: Flask, address: str) -> None:
        """Without a login, pages for administrators redirect to the login page."""
        answer = shop.test_client().get(address)
        assert answer.status_code == 302
        assert answer.location.startswith("/auth/login?next=")

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_customers_get_403(self, shop: Flask, address: str) -> None:
        """Customers cannot open pages for administrators."""
        assert signed_in(shop).get(address).status_code == 403

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_administrators_have_access(self, shop: Flask, address: str) -> None:
        """Administrators can open their pages and the dashboard."""
        assert signed_in(shop, is_admin=True).get(address).status_code == 200

    def test_audit_trail_names_the_administrator(self, shop: Flask) -> None:
        """The audit trail records the address of the administrator."""
        admin = signed_in(shop, is_admin=True)
        answer = admin.get("/jobs/api/v1/queues")
        headers = {"X-CSRFToken": answer.headers["X-CSRFToken"]}
        paused = admin.post("/jobs/queues/pause", data={"queue": "default"}, headers=headers)
        assert paused.status_code == 303
        (entry,) = admin.get("/jobs/api/v1/audit").json["entries"]
        assert (entry["action"], entry["actor"]) == ("pause", "sam@example.com")

    def test_policy_forbids_scripts_and_frames(self, shop: Flask) -> None:
        """The Content-Security-Policy of the shop forbids scripts and frames."""
        policy = shop.test_client().get("/").headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "frame-ancestors 'none'" in policy


class TestSampleJob:
    def test_route_runs_the_sample_job(self, shop: Flask) -> None:
        """The route enqueues the job by name and links to it, and the job runs."""
        admin = signed_in(shop, is_admin=True)
        page = admin.get("/test-background-job").text
        (job,) = rows(shop, Job)
        assert (job.target, job.method) == ("example_app.jobs.SampleJob", "execute")
        assert (job.parameters, job.retries) == (["Hello from the shop"], 3)
        assert f'href="/jobs/job/{job.id}"' in page
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result == "HELLO FROM THE SHOP"

    def test_cross_site_request_is_refused(self, shop: Flask) -> None:
        """A request from another site enqueues nothing."""
        client = signed_in(shop)
        answer = client.get("/test-background-job", headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 403
        assert rows(shop, Job) == []


class TestCommands:
    def test_seed_is_idempotent(self, shop: Flask) -> None:
        """The second call adds nothing and prints the same password, which is valid."""
        runner = shop.test_cli_runner()
        first, second = (runner.invoke(args=["seed"]) for _ in range(2))
        assert "60 products, 40 orders and 24 photos" in first.output
        assert "0 products, 0 orders and 0 photos" in second.output
        account = re.search(r"Administrator: (\S+), password: (\S+)", second.output)
        assert account is not None
        assert account[0] in first.output
        client = shop.test_client()
        client.post("/auth/login", data={"email": account[1], "password": account[2]})
        assert client.get("/admin/imports").status_code == 200

    def test_seed_fills_the_first_page_with_photos(self, shop: Flask) -> None:
        """After the jobs of ``seed`` have run, every product on the first page has a thumbnail."""
        shop.test_cli_runner().invoke(args=["seed"])
        assert statuses(shop) == [JobStatus.COMPLETED] * samples.SAMPLE_PHOTOS
        page = shop.test_client().get("/").text
        assert page.count("-160.webp") == samples.SAMPLE_PHOTOS
        assert "No photo" not in page

    def test_products_with_photos_are_listed_first(self, shop: Flask) -> None:
        """The first page shows products with photos, however many others there are."""
        admin = signed_in(shop, is_admin=True)
        product_id = add_product(shop, name="Zebra")
        for number in range(30):
            add_product(shop, f"V-{number}")
        assert "Zebra" not in admin.get("/").text
        send_photo(admin, product_id, picture())
        assert "Zebra" in admin.get("/").text

    def test_seed_uses_the_configured_password(self, make_shop: MakeShop) -> None:
        """A configured password replaces an older one."""
        shop = make_shop()
        shop.test_cli_runner().invoke(args=["seed"])
        shop.config["SHOP_ADMIN_PASSWORD"] = "another password"
        assert "password: another password" in shop.test_cli_runner().invoke(args=["seed"]).output
        with shop.app_context():
            admin = db.session.scalar(sa.select(User).where(User.is_admin))
            assert admin is not None
            assert admin.has_password("another password")

    def test_sample_jobs_reach_different_statuses(self, shop: Flask, monkeypatch: Any) -> None:
        """Of the sample jobs, some complete, some wait, some will be retried, and some fail."""
        monkeypatch.setattr("example_app.jobs.time.sleep", lambda seconds: None)
        runner = shop.test_cli_runner()
        runner.invoke(args=["seed"])
        drain(shop)
        seeded = len(rows(shop, Job))
        listed = runner.invoke(args=["sample-jobs"]).output
        assert "example_app.jobs.import_products" in listed
        drain(shop)
        jobs = rows(shop, Job)[seeded:]
        assert len(jobs) == len(listed.splitlines()) == 15
        assert {job.status for job in jobs} == {"completed", "scheduled", "retrying", "failed"}
        assert any(job.priority == 3 for job in jobs)


class TestMigrations:
    def test_migrations_match_the_models(
        self, make_shop: MakeShop, empty_database_url: str
    ) -> None:
        """On an empty database, ``check`` finds no difference after ``upgrade``, and ``downgrade``
        drops all tables."""
        shop = make_shop(tables=False, SQLALCHEMY_DATABASE_URI=empty_database_url)
        with shop.app_context():
            flask_migrate.upgrade()
            flask_migrate.check()
            tables = set(sa.inspect(db.engine).get_table_names())
            assert {"bgjobs_job", "shop_order"} <= tables
            # `check` does not compare the conditions of partial indexes.
            migrated = _indexes()
            flask_migrate.downgrade(revision="base")
            assert sa.inspect(db.engine).get_table_names() == ["alembic_version"]
            db.create_all()
            assert _indexes() == migrated
            db.drop_all()


def _indexes() -> set[str]:
    """The definitions of all indexes of the job table."""
    table = sa.Table("bgjobs_job", sa.MetaData(), autoload_with=db.engine)
    return {str(sa.schema.CreateIndex(index).compile(db.engine)) for index in table.indexes}
