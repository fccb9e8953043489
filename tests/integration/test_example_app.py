"""The example shop, with its jobs run in this thread."""

from __future__ import annotations

import io
import re
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask_migrate
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image, ImageDraw
from werkzeug.test import TestResponse

from example_app import create_app, photos, samples, trouble
from example_app.auth import is_local
from example_app.drawing import draw_photo
from example_app.extensions import db
from example_app.models import Order, OutboxMail, Product, ProductUpload, Report, User
from flask_bgjobs import Job, JobStatus
from flask_bgjobs.testing import drain

PASSWORD = "correct horse battery"
CSV_HEAD = "sku,name,category,price,stock\n"

MakeShop = Callable[..., Flask]


# Not called `app`: pytest-flask would keep a request context open around every test, and all
# requests of the test would share one current_user.
@pytest.fixture
def make_shop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_shop: Path
) -> Iterator[MakeShop]:
    for name in ("SHOP_DATABASE_URL", "SHOP_SMTP_HOST", "SHOP_ADMIN_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHOP_INSTANCE_PATH", str(tmp_path / "instance"))
    made: list[Flask] = []
    instance = tmp_path / "instance"
    instance.mkdir()

    def make(*, tables: bool = True, **overrides: Any) -> Flask:
        app = create_app({"TESTING": True, "WTF_CSRF_ENABLED": False, **overrides})
        made.append(app)
        if tables and "SQLALCHEMY_DATABASE_URI" in overrides:
            _create_tables(app)
        elif tables and not (instance / "shop.sqlite").exists():
            shutil.copy(prepared_shop, instance / "shop.sqlite")
        return app

    yield make
    for app in made:
        with app.app_context():
            db.session.remove()
            db.engine.dispose()
            app.extensions["bgjobs"].store.dispose()


def _create_tables(app: Flask) -> None:
    with app.app_context():
        db.create_all()


@pytest.fixture(scope="module")
def prepared_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the shop's tables, to copy: to create them takes longer than a test."""
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
        user.set_password(PASSWORD)
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
        """Who registers is signed in at once, and can sign in again with the password."""
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
        """The database never holds the password itself."""
        add_user(shop, "sam@example.com")
        (user,) = rows(shop, User)
        assert user.password_hash.startswith("scrypt:")
        assert PASSWORD not in user.password_hash

    def test_address_is_taken_once(self, shop: Flask) -> None:
        """A second registration with an address, in other letters too, is refused."""
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
        """A wrong password and an unknown address get the same answer."""
        add_user(shop, "sam@example.com")
        answer = shop.test_client().post("/auth/login", data={"email": email, "password": password})
        assert "E-mail or password is wrong." in answer.text

    def test_login_leads_to_the_page_that_asked_for_it(self, shop: Flask) -> None:
        """After the login the visitor is where they wanted to be."""
        add_user(shop, "sam@example.com")
        client = shop.test_client()
        asked = client.get("/orders").location
        answer = client.post(asked, data={"email": "sam@example.com", "password": PASSWORD})
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
    def test_login_leads_to_no_other_site(self, target: str) -> None:
        """Only addresses of this site are followed."""
        assert not is_local(target)

    def test_forms_without_a_token_are_refused(self, make_shop: MakeShop) -> None:
        """A form that did not come from this shop changes nothing."""
        shop = make_shop(WTF_CSRF_ENABLED=True)
        form = {"name": "Kim", "email": "kim@example.com", "password": PASSWORD}
        answer = shop.test_client().post("/auth/register", data={**form, "repeated": PASSWORD})
        assert answer.status_code == 400
        assert rows(shop, User) == []


class TestProducts:
    def test_list_is_searched_and_paged(self, shop: Flask) -> None:
        """The list shows a page at a time, and only what the search matches."""
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
    def test_odd_addresses_are_answered(self, shop: Flask, address: str) -> None:
        """No page number and no search breaks the list."""
        for number in range(30):
            add_product(shop, f"V-{number}")
        assert shop.test_client().get(address).status_code == 200

    def test_unknown_products_are_not_found(self, shop: Flask) -> None:
        """Ids that do not exist, or could not, are a 404."""
        client = shop.test_client()
        assert client.get("/products/7").status_code == 404
        assert client.get(f"/products/{10**30}").status_code == 404


class TestOrders:
    def test_order_brings_a_receipt(self, shop: Flask) -> None:
        """An order takes stock, and its job writes the receipt into the outbox."""
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
    def test_order_on_a_server_brings_a_receipt(
        self, make_shop: MakeShop, database_url: str
    ) -> None:
        """On a database server an order and its receipt go the same way."""
        shop = make_shop(SQLALCHEMY_DATABASE_URI=database_url)
        product_id = add_product(shop, name="Blaue Eule 🦉")
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 2})
        assert statuses(shop) == [JobStatus.COMPLETED]
        (mail,) = rows(shop, OutboxMail)
        assert "Eule 🦉" in mail.body

    def test_receipt_job_may_run_twice(self, shop: Flask) -> None:
        """A receipt job that runs again sends no second mail."""
        product_id = add_product(shop)
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 1})
        from example_app.jobs import send_receipt

        with shop.app_context():
            order_id = rows(shop, Order)[0].id
            send_receipt.enqueue(order_id)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert len(rows(shop, OutboxMail)) == 1
        assert sorted(job.result for job in rows(shop, Job)) == [
            "already sent",
            "outbox: sam@example.com",
        ]

    def test_order_and_job_stand_or_fall_together(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the order cannot be committed, there is no job either."""
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
        """More than is in stock, nothing, and nonsense place no order."""
        product_id = add_product(shop, stock=5)
        client = signed_in(shop)
        client.post(f"/products/{product_id}/order", data={"quantity": quantity})
        assert rows(shop, Order) == []
        assert rows(shop, Product)[0].stock == 5

    def test_strangers_cannot_order(self, shop: Flask) -> None:
        """An order needs a login."""
        product_id = add_product(shop)
        answer = shop.test_client().post(f"/products/{product_id}/order", data={"quantity": 1})
        assert answer.location.startswith("/auth/login")
        assert rows(shop, Order) == []

    def test_orders_of_others_are_not_shown(self, shop: Flask) -> None:
        """Everybody sees their own orders only."""
        product_id = add_product(shop)
        signed_in(shop).post(f"/products/{product_id}/order", data={"quantity": 1})
        other = signed_in(shop, "kim@example.com")
        assert "No orders yet" in other.get("/orders").text


class MailServer(socketserver.ThreadingTCPServer):
    """Speaks just enough SMTP to take a mail, and answers DATA with ``answer``."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), MailTalk)
        self.answer = answer
        self.mails: list[str] = []


class MailTalk(socketserver.StreamRequestHandler):
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
        """With a mail server configured, the receipt is really sent, once."""
        server = mail_server(b"250 taken")
        shop = self.order_with(make_shop, server)
        assert statuses(shop) == [JobStatus.COMPLETED]
        (mail,) = server.mails
        assert "To: sam@example.com" in mail
        assert "Message-ID: <receipt-1@example.com>" in mail
        assert rows(shop, OutboxMail)[0].transport == "smtp"

    def test_busy_server_is_asked_again(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """A temporary refusal uses a retry."""
        shop = self.order_with(make_shop, mail_server(b"451 come back later"))
        assert statuses(shop) == [JobStatus.RETRYING]
        assert rows(shop, OutboxMail)[0].sent_at is None

    def test_final_refusal_is_final(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """A permanent refusal fails the job at once."""
        shop = self.order_with(make_shop, mail_server(b"554 never"))
        assert statuses(shop) == [JobStatus.FAILED]

    def test_missing_server_is_asked_again(
        self, make_shop: MakeShop, mail_server: Callable[[bytes], MailServer]
    ) -> None:
        """No answer at all uses a retry."""
        server = mail_server(b"250 taken")
        server.shutdown()
        server.server_close()
        shop = self.order_with(make_shop, server)
        assert statuses(shop) == [JobStatus.RETRYING]


class TestImport:
    def test_import_creates_updates_and_counts(self, shop: Flask) -> None:
        """The job creates and updates by SKU, and counts lines that it cannot use."""
        add_product(shop, "A-1", "Old name")
        admin = signed_in(shop, is_admin=True)
        text = (
            CSV_HEAD + "A-1,New name,Home,9.99,3\nB-2,Bowl,Kitchen,4,\nC-3,Cup,,free,1\n,x,,1,1\n"
        )
        page = upload(admin, text).location
        assert "pending" in admin.get(page).text
        assert statuses(shop) == [JobStatus.COMPLETED]
        (job,) = rows(shop, Job)
        assert job.result == {"created": 1, "updated": 1, "unchanged": 0, "bad": 2}
        assert job.progress == 1
        assert {p.sku: (p.name, p.price_cents, p.stock) for p in rows(shop, Product)} == {
            "A-1": ("New name", 999, 3),
            "B-2": ("Bowl", 400, 0),
        }
        assert "completed" in admin.get(page).text

    def test_importing_again_changes_nothing(self, shop: Flask) -> None:
        """The same file a second time finds every product as it should be."""
        admin = signed_in(shop, is_admin=True)
        text = samples.product_csv(300).decode()
        upload(admin, text)
        upload(admin, text)
        drain(shop)
        first, second = (job.result for job in rows(shop, Job))
        assert first == {"created": 295, "updated": 0, "unchanged": 0, "bad": 5}
        assert second == {"created": 0, "updated": 0, "unchanged": 295, "bad": 5}

    def test_interrupted_import_goes_on(self, shop: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
        """An attempt that broke off is continued by the next one, and no row counts twice."""
        admin = signed_in(shop, is_admin=True)
        upload(admin, samples.product_csv(300).decode())
        from example_app import jobs

        import_chunk, calls = jobs._import_chunk, []

        def breaks_once(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise ConnectionError("the plug was pulled")
            import_chunk(*arguments)

        monkeypatch.setattr(jobs, "_import_chunk", breaks_once)
        assert statuses(shop) == [JobStatus.RETRYING]
        assert rows(shop, ProductUpload)[0].rows_done == jobs.IMPORT_CHUNK
        shop.extensions["bgjobs"].store.retry([rows(shop, Job)[0].id])
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result == {"created": 295, "updated": 0, "unchanged": 0, "bad": 5}

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("name,price\nx,1\n", "lacks the columns sku"),
            ("", "lacks the columns sku, name, price"),
            ("\x00\x00", "lacks the columns"),
        ],
    )
    def test_file_that_is_no_product_file_fails(self, shop: Flask, text: str, why: str) -> None:
        """A file without the columns fails at once and says what is missing."""
        admin = signed_in(shop, is_admin=True)
        page = upload(admin, text).location
        assert statuses(shop) == [JobStatus.FAILED]
        assert why in rows(shop, Job)[0].error
        assert why in admin.get(page).text

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
    def test_bad_line_is_counted_and_no_more(self, shop: Flask, row: str) -> None:
        """A line that makes no sense is counted, and the lines after it are imported."""
        admin = signed_in(shop, is_admin=True)
        upload(admin, f"{CSV_HEAD}{row}\nB-2,Bowl,,4,1\n")
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result["bad"] == 1
        assert [product.sku for product in rows(shop, Product)] == ["B-2"]

    def test_other_files_are_refused(self, shop: Flask) -> None:
        """Only .csv files are taken, and only small ones."""
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
    """A picture whose left half is red and whose right half is blue, where it has colours."""
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


def files(shop: Flask) -> set[str]:
    """The names of all files of photos."""
    folder = Path(shop.instance_path, "photos")
    return {path.name for path in folder.rglob("*") if path.is_file()}


def files_of(name: str) -> set[str]:
    return {name, f"{name}-160.webp", f"{name}-480.webp"}


def shown(client: FlaskClient, name: str, size: int) -> Image.Image:
    with client.get(f"/photos/{name}-{size}.webp") as answer:
        assert (answer.status_code, answer.mimetype) == (200, "image/webp")
        return Image.open(io.BytesIO(answer.data))


def black(size: tuple[int, int]) -> bytes:
    """A PNG that is small as a file, however large it is."""
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
        """Pages say that the photo is being made until the job has made both sizes; then they
        show it."""
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
        stranger = shop.test_client()
        assert shown(stranger, product.photo, 480).size == (480, 240)
        assert shown(stranger, product.photo, 160).size == (160, 80)
        assert files(shop) == files_of(product.photo)

    def test_job_runs_in_the_process_pool_and_tells_what_it_does(self, shop: Flask) -> None:
        """Its queue belongs to the process pool; it has a timeout, progress and log lines."""
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

    def test_photo_is_turned_and_tells_nothing_more(self, shop: Flask) -> None:
        """A photo is turned as the camera was held; where it was taken is not passed on."""
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright
        exif[0x010F] = "Some Camera"
        exif.get_ifd(0x8825)[1] = "N"
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        content = picture("JPEG", exif=exif.tobytes(), icc_profile=b"x" * 200, comment=b"secret")
        assert b"Some Camera" in content
        send_photo(admin, product_id, content, "a.jpg")
        assert statuses(shop) == [JobStatus.COMPLETED]
        (product,) = rows(shop, Product)
        made = shown(admin, product.photo, 480)
        assert made.size == (240, 480)
        top, bottom = (made.convert("RGB").getpixel((120, y)) for y in (20, 460))
        assert top[0] > 200 > bottom[0]
        assert not {"exif", "icc_profile", "xmp", "comment"} & set(made.info)
        assert not made.getexif()

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
    def test_every_kind_of_png_is_taken(self, shop: Flask, mode: str) -> None:
        """Palettes, greys and transparency all become thumbnails."""
        product_id = add_product(shop)
        send_photo(signed_in(shop, is_admin=True), product_id, picture(mode=mode))
        assert statuses(shop) == [JobStatus.COMPLETED]

    def test_print_colours_are_taken(self, shop: Flask) -> None:
        """A CMYK JPEG becomes a picture in the web's colours."""
        product_id = add_product(shop)
        content = picture("JPEG", mode="CMYK")
        send_photo(signed_in(shop, is_admin=True), product_id, content, "a.jpeg")
        assert statuses(shop) == [JobStatus.COMPLETED]

    def test_small_photo_is_not_blown_up(self, shop: Flask) -> None:
        """A photo that is smaller than a thumbnail keeps its size."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture(size=(20, 10)))
        drain(shop)
        assert shown(admin, rows(shop, Product)[0].photo, 480).size == (20, 10)

    @pytest.mark.parametrize(
        ("content", "filename", "why"),
        [
            (b"", "a.png", "not a JPEG, PNG or WebP picture"),
            (b"not a picture", "a.png", "not a JPEG, PNG or WebP picture"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png", "not a JPEG, PNG or WebP"),
            (picture("GIF"), "a.png", "not a JPEG, PNG or WebP picture"),
            (picture(), "a.gif", "Choose a .jpg, .png or .webp file."),
            (picture(), "a", "Choose a .jpg, .png or .webp file."),
            (damaged(picture("WEBP")), "a.webp", "not a JPEG, PNG or WebP picture"),
            (black((8_000, 5_001)), "a.png", "more than 40 million pixels"),
            (black((10_000, 10_000)), "a.png", "more than 40 million pixels"),
            (black((20_000, 10_000)), "a.png", "more than 40 million pixels"),
        ],
        ids=[
            "empty",
            "text",
            "svg",
            "gif",
            "gif name",
            "no suffix",
            "damaged",
            "large",
            "larger",
            "bomb",
        ],
    )
    def test_what_is_no_photo_is_refused(
        self, shop: Flask, content: bytes, filename: str, why: str
    ) -> None:
        """The upload of anything else is answered with the reason, and leaves nothing behind."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        answer = send_photo(admin, product_id, content, filename)
        assert answer.status_code == 200
        assert why in answer.text
        assert (rows(shop, Job), files(shop)) == ([], set())
        assert rows(shop, Product)[0].photo is None

    def test_large_file_is_refused(self, shop: Flask) -> None:
        """More than MAX_UPLOAD_BYTES are not even read."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        large = admin.post(
            f"/admin/products/{product_id}/photo",
            data=b"x" * (6 * 1024 * 1024),
            content_type="multipart/form-data; boundary=x",
        )
        assert large.status_code == 413
        assert (rows(shop, Job), files(shop)) == ([], set())

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_damaged_photo_fails_for_good(self, shop: Flask, kind: str) -> None:
        """A file that breaks off fails the job without a retry, and its page says why."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        page = send_photo(admin, product_id, damaged(picture(kind)), f"a.{kind.lower()}").location
        assert statuses(shop) == [JobStatus.FAILED]
        (job,) = rows(shop, Job)
        assert "the picture is damaged" in job.error
        assert "the picture is damaged" in admin.get(page).text
        assert "No photo" in admin.get("/").text

    def test_replaced_photo_is_removed(self, shop: Flask) -> None:
        """A new photo takes the place of the old one, of which no file is left."""
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
        assert files(shop) == files_of(after)
        assert shown(admin, after, 480).size == (240, 480)

    def test_photo_that_was_replaced_before_its_job_ran_leaves_nothing(self, shop: Flask) -> None:
        """The first of two uploads in a row is never shown, and its job ends well."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        for _ in range(2):
            send_photo(admin, product_id, picture())
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert [job.result for job in rows(shop, Job)] == ["photo was replaced", "made"]
        assert files(shop) == files_of(rows(shop, Product)[0].photo)

    def test_photo_that_is_replaced_while_its_job_runs_leaves_nothing(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a job has made of a photo that is replaced meanwhile is removed by the job."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture())
        make_thumbnails, calls = photos.make_thumbnails, []

        def replaced_at_first(name: str) -> Iterator[photos.Thumbnail]:
            calls.append(name)
            made = list(make_thumbnails(name))
            if len(calls) == 1:
                send_photo(admin, product_id, picture())
            return iter(made)

        monkeypatch.setattr(photos, "make_thumbnails", replaced_at_first)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert [job.result for job in rows(shop, Job)] == ["photo was replaced", "made"]
        assert files(shop) == files_of(rows(shop, Product)[0].photo)

    def test_job_may_run_twice(self, shop: Flask) -> None:
        """A job that runs again makes the same files again."""
        from example_app.jobs import make_thumbnails

        product_id = add_product(shop)
        send_photo(signed_in(shop, is_admin=True), product_id, picture())
        with shop.app_context():
            name = rows(shop, Product)[0].photo
            make_thumbnails.enqueue(product_id, name)
        assert statuses(shop) == [JobStatus.COMPLETED] * 2
        assert files(shop) == files_of(name)

    def test_upload_that_is_not_committed_leaves_no_file(
        self, shop: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the product cannot be saved, neither file nor job stays, and the old photo does."""
        product_id = add_product(shop)
        admin = signed_in(shop, is_admin=True)
        send_photo(admin, product_id, picture())
        drain(shop)
        kept = files(shop)

        def refuse(*_: object) -> None:
            raise RuntimeError("the disk is full")

        with shop.app_context():
            sa.event.listen(db.session, "before_commit", refuse)
        try:
            with pytest.raises(RuntimeError, match="disk is full"):
                send_photo(admin, product_id, picture())
        finally:
            sa.event.remove(db.session, "before_commit", refuse)
        assert files(shop) == kept == files_of(rows(shop, Product)[0].photo)
        assert len(rows(shop, Job)) == 1

    def test_only_thumbnails_are_served(self, shop: Flask) -> None:
        """Uploads, other sizes and other files cannot be fetched."""
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

    def test_drawn_photos_are_photos(self) -> None:
        """The pictures that the seed draws are as good as uploads, and always the same."""
        drawn = draw_photo("SHOP-0001")
        photos.check(drawn)
        assert drawn == draw_photo("SHOP-0001") != draw_photo("SHOP-0002")


class TestTrouble:
    @pytest.mark.parametrize("name", ["hang", "stubborn", "crash"])
    def test_page_sends_them_to_child_processes(self, shop: Flask, name: str) -> None:
        """The page enqueues each into a queue of the process pool, and leads to the job."""
        admin = signed_in(shop, is_admin=True)
        assert f"/admin/trouble/{name}" in admin.get("/admin/trouble").text
        answer = admin.post(f"/admin/trouble/{name}", data={"queue": "default"})
        (job,) = rows(shop, Job)
        assert answer.location == f"/jobs/job/{job.id}"
        assert job.target == f"example_app.trouble.{name}"
        assert shop.config["BGJOBS_QUEUE_POOLS"][job.queue] == "process"

    @pytest.mark.parametrize("job", [trouble.hang, trouble.stubborn, trouble.crash])
    def test_they_refuse_to_run_in_the_workers_own_process(self, shop: Flask, job: Any) -> None:
        """However it got there, such a job fails at once outside a child process."""
        with shop.app_context():
            job.using(queue="default").enqueue()
        assert statuses(shop) == [JobStatus.FAILED]
        assert "runs only in a child process" in rows(shop, Job)[0].error

    @pytest.mark.parametrize("address", ["/admin/trouble/hang", "/admin/trouble/mischief"])
    def test_others_cannot_start_any(self, shop: Flask, address: str) -> None:
        """Customers cannot start one, and nobody one that does not exist."""
        assert signed_in(shop).post(address).status_code in (403, 404)
        assert rows(shop, Job) == []


class TestReports:
    def test_report_is_built_and_downloaded(self, shop: Flask) -> None:
        """The job sums up the days' orders, and the page offers the file."""
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
        """A report needs its first day first."""
        admin = signed_in(shop, is_admin=True)
        answer = admin.post("/admin/reports", data={"since": "2026-02-02", "until": "2026-02-01"})
        assert "before the first" in answer.text
        assert rows(shop, Report) == []


class TestAccess:
    ADMIN_PAGES = ("/jobs/", "/admin/imports", "/admin/reports", "/admin/outbox", "/admin/trouble")

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_strangers_are_asked_to_sign_in(self, shop: Flask, address: str) -> None:
        """Without a login, administrators' pages lead to the login page."""
        answer = shop.test_client().get(address)
        assert answer.status_code == 302
        assert answer.location.startswith("/auth/login?next=")

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_customers_are_kept_out(self, shop: Flask, address: str) -> None:
        """A login alone opens none of the administrators' pages."""
        assert signed_in(shop).get(address).status_code == 403

    @pytest.mark.parametrize("address", ADMIN_PAGES)
    def test_administrators_get_in(self, shop: Flask, address: str) -> None:
        """Administrators see their pages, the dashboard among them."""
        assert signed_in(shop, is_admin=True).get(address).status_code == 200

    def test_the_audit_names_them(self, shop: Flask) -> None:
        """What administrators change in the dashboard is written down with their address."""
        admin = signed_in(shop, is_admin=True)
        answer = admin.get("/jobs/api/v1/queues")
        headers = {"X-CSRFToken": answer.headers["X-CSRFToken"]}
        paused = admin.post("/jobs/queues/pause", data={"queue": "default"}, headers=headers)
        assert paused.status_code == 303
        (entry,) = admin.get("/jobs/api/v1/audit").json["entries"]
        assert (entry["action"], entry["actor"]) == ("pause", "sam@example.com")

    def test_pages_may_run_no_scripts(self, shop: Flask) -> None:
        """The shop's pages say that they hold no script and are in no frame."""
        policy = shop.test_client().get("/").headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "frame-ancestors 'none'" in policy


class TestSampleJob:
    def test_route_runs_the_sample_job(self, shop: Flask) -> None:
        """The route enqueues the job by name, links to it, and the job runs."""
        admin = signed_in(shop, is_admin=True)
        page = admin.get("/test-background-job").text
        (job,) = rows(shop, Job)
        assert (job.target, job.method) == ("example_app.jobs.SampleJob", "execute")
        assert (job.parameters, job.retries) == (["Hello from the shop"], 3)
        assert f'href="/jobs/job/{job.id}"' in page
        assert statuses(shop) == [JobStatus.COMPLETED]
        assert rows(shop, Job)[0].result == "HELLO FROM THE SHOP"

    def test_other_sites_cannot_start_it(self, shop: Flask) -> None:
        """A link on another site enqueues nothing."""
        client = signed_in(shop)
        answer = client.get("/test-background-job", headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 403
        assert rows(shop, Job) == []


class TestCommands:
    def test_seed_may_be_called_again(self, shop: Flask) -> None:
        """The second call adds nothing and prints the same password, which works."""
        runner = shop.test_cli_runner()
        first, second = (runner.invoke(args=["seed"]) for _ in range(2))
        assert "60 products, 40 orders and 24 photos" in first.output
        assert "0 products, 0 orders and 0 photos" in second.output
        said = re.search(r"Administrator: (\S+), password: (\S+)", second.output)
        assert said is not None
        assert said[0] in first.output
        client = shop.test_client()
        client.post("/auth/login", data={"email": said[1], "password": said[2]})
        assert client.get("/admin/imports").status_code == 200

    def test_seed_fills_the_first_page_with_photos(self, shop: Flask) -> None:
        """After the seed's jobs have run, every product on the first page has its thumbnail."""
        shop.test_cli_runner().invoke(args=["seed"])
        assert statuses(shop) == [JobStatus.COMPLETED] * samples.SAMPLE_PHOTOS
        page = shop.test_client().get("/").text
        assert page.count("-160.webp") == samples.SAMPLE_PHOTOS
        assert "No photo" not in page

    def test_products_with_photos_come_first(self, shop: Flask) -> None:
        """However many products an import adds, the first page shows those with photos."""
        admin = signed_in(shop, is_admin=True)
        product_id = add_product(shop, name="Zebra")
        for number in range(30):
            add_product(shop, f"V-{number}")
        assert "Zebra" not in admin.get("/").text
        send_photo(admin, product_id, picture())
        assert "Zebra" in admin.get("/").text

    def test_seed_takes_the_password_from_the_environment(self, make_shop: MakeShop) -> None:
        """A configured password is used, and replaces an older one."""
        shop = make_shop()
        shop.test_cli_runner().invoke(args=["seed"])
        shop.config["SHOP_ADMIN_PASSWORD"] = "another password"
        assert "password: another password" in shop.test_cli_runner().invoke(args=["seed"]).output
        with shop.app_context():
            admin = db.session.scalar(sa.select(User).where(User.is_admin))
            assert admin is not None
            assert admin.has_password("another password")

    def test_sample_jobs_are_a_lively_mix(self, shop: Flask, monkeypatch: Any) -> None:
        """Some succeed, some wait, some will be tried again, and one fails for good."""
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
    def test_migrations_make_the_tables_of_the_models(
        self, make_shop: MakeShop, empty_database_url: str
    ) -> None:
        """On an empty database, upgrade leaves nothing for check to find, and downgrade goes
        all the way back."""
        shop = make_shop(tables=False, SQLALCHEMY_DATABASE_URI=empty_database_url)
        with shop.app_context():
            flask_migrate.upgrade()
            flask_migrate.check()
            tables = set(sa.inspect(db.engine).get_table_names())
            assert {"bgjobs_job", "shop_order"} <= tables
            # Which rows stand in an index is more than check compares.
            migrated = _indexes()
            flask_migrate.downgrade(revision="base")
            assert sa.inspect(db.engine).get_table_names() == ["alembic_version"]
            db.create_all()
            assert _indexes() == migrated
            db.drop_all()


def _indexes() -> set[str]:
    """The indexes of the job table, with all that the database tells of them."""
    table = sa.Table("bgjobs_job", sa.MetaData(), autoload_with=db.engine)
    return {str(sa.schema.CreateIndex(index).compile(db.engine)) for index in table.indexes}
