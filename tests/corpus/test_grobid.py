"""PDFs sent to a GROBID, which a server on loopback plays: busy, slow, failing, and dying in the middle."""

import http.server
import re
import threading
import time
from collections import Counter
from hashlib import sha256

import pytest

from k2mini.corpus import grobid
from k2mini.corpus.grobid import process


class Stub:
    """A GROBID whose answers to a PDF are what `plan` lists for its content, then a TEI of it.

    Attributes: `sent`, how often each PDF came; `most`, how many requests it had at a time.
    """

    def __init__(self):
        self.plan, self.sent, self.fields, self.now, self.most = {}, Counter(), [], 0, 0
        self.lock, self.dies_after, self.killer = threading.Lock(), None, None
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.answer(200 if self.path == "/api/isalive" else 404, b"true")

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                boundary = b"--" + self.headers["Content-Type"].split("boundary=")[1].encode()
                parts = [part.split(b"\r\n\r\n", 1) for part in body.split(boundary)[1:-1]]
                form = {re.search(rb'name="(\w+)"', head)[1].decode(): value[:-2] for head, value in parts}
                pdf = form.pop("input")
                with stub.lock:
                    stub.sent[pdf] += 1
                    stub.fields.append((self.path, form))
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                    dead = stub.dies_after is not None and sum(stub.sent.values()) > stub.dies_after
                    step = stub.plan[pdf].pop(0) if stub.plan.get(pdf) else 200
                if pdf == stub.killer:
                    stub.server.server_close()
                    dead = True
                try:
                    if dead:
                        self.connection.close()
                        return
                    if isinstance(step, float):
                        time.sleep(step)
                        step = 200
                    if step == "cut":
                        self.answer(200, b"<TEI><text>half", **{"Content-Length": 999})
                        self.connection.close()
                    elif isinstance(step, tuple):
                        self.answer(*step)
                    elif step == 302:
                        self.answer(302, Location="http://198.51.100.1/")
                    else:
                        self.answer(step, b"<TEI><text>%s</text></TEI>" % pdf if step == 200 else b"<p>busy</p>")
                finally:
                    with stub.lock:
                        stub.now -= 1

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(grobid, "PAUSE", 0.01)
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def pdfs(tmp_path):
    """Nine PDFs, the last two alike."""
    paths = [tmp_path / f"{n}.pdf" for n in range(9)]
    for n, path in enumerate(paths):
        path.write_bytes(b"%%PDF-%d" % min(n, 7))
    return paths


def teis(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(".tei.xml")}


def run(pdfs, url, folder, **options):
    listed = []
    return process(pdfs, url, folder, on_error=lambda *where: listed.append(where), **options), listed


def test_every_pdf_has_its_tei(stub, pdfs, tmp_path):
    """Busy twice, slow, or at once; two PDFs alike are sent once, and none on a second start."""
    stub.plan = {b"%PDF-1": [503, 503], b"%PDF-2": [0.1], b"%PDF-3": [503, 0.05]}
    found, listed = run(pdfs, f"{stub.url}/", tmp_path / "tei", concurrency=3)
    assert listed == []
    assert list(found) == pdfs
    for pdf, tei in found.items():
        assert tei.name == sha256(pdf.read_bytes()).hexdigest() + ".tei.xml"
        assert tei.read_bytes() == b"<TEI><text>%s</text></TEI>" % pdf.read_bytes()
    assert stub.sent == {b"%%PDF-%d" % n: {1: 3, 3: 2}.get(n, 1) for n in range(8)}
    assert 1 < stub.most <= 3
    assert set(dict(stub.fields)) == {"/api/processFulltextDocument"}
    assert stub.fields[0][1] == {name: value.encode() for name, value in grobid._FIELDS.items()}
    before = stub.sent.copy()
    assert run(pdfs, stub.url, tmp_path / "tei") == (found, [])
    assert stub.sent == before
    assert len(list((tmp_path / "tei").iterdir())) == 8


def test_what_grobid_cant_read_is_listed(stub, pdfs, tmp_path):
    """And is not sent again, until its note is removed."""
    stub.plan = {
        b"%PDF-0": [(500, b"<html>[NO_BLOCKS] PDF parsing resulted in empty content</html>")],
        b"%PDF-1": [204],
        b"%PDF-2": [(200, b"[TIMEOUT] PDF to XML conversion timed out")],
    }
    pdfs.append(tmp_path / "missing.pdf")
    found, listed = run(pdfs, stub.url, tmp_path / "tei")
    assert list(found) == pdfs[3:9]
    reasons = {place.split("/")[-1]: reason for place, reason in listed}
    assert reasons.pop("missing.pdf") == "No such file or directory"
    assert reasons == {
        "0.pdf": "GROBID: 500 [NO_BLOCKS] PDF parsing resulted in empty content",
        "1.pdf": "GROBID: 204 no text",
        "2.pdf": "GROBID: 200 [TIMEOUT] PDF to XML conversion timed out",
    }
    before = stub.sent.copy()
    assert run(pdfs, stub.url, tmp_path / "tei") == (found, listed)
    assert stub.sent == before
    for note in (tmp_path / "tei").glob("*.error"):
        note.unlink()
    assert list(run(pdfs, stub.url, tmp_path / "tei")[0]) == pdfs[:9]


def test_a_server_without_an_answer_in_time(stub, pdfs, tmp_path, monkeypatch):
    monkeypatch.setattr(grobid, "TIMEOUT", 0.15)
    stub.plan = {b"%PDF-0": [0.4], b"%PDF-1": [0.4, 0.4, 0.4]}
    found, listed = run(pdfs, stub.url, tmp_path / "tei")
    assert list(found) == [pdfs[0], *pdfs[2:]]
    assert listed == [(str(pdfs[1]), "GROBID: does not answer (timed out)")]


def test_a_server_that_dies_in_the_middle(stub, pdfs, tmp_path):
    """What was done is kept and is not sent again to the next one."""
    stub.dies_after = 4
    threading.Thread(target=lambda: (wait_for(lambda: sum(stub.sent.values()) > 4), stub.close())).start()
    with pytest.raises(
        ValueError, match=r"^GROBID at http\S+ does not answer \(.+\); 4 of 9 PDFs are done and kept"
    ) as error:
        run(pdfs, stub.url, tmp_path / "tei", concurrency=2)
    assert "\n" not in str(error.value)
    kept = teis(tmp_path / "tei")
    assert len(kept) == 4
    second = Stub()
    found, listed = run(pdfs, second.url, tmp_path / "tei")
    second.close()
    assert (list(found), listed) == (pdfs, [])
    assert len(second.sent) == 4
    assert set(second.sent.values()) == {1}
    assert kept.items() <= teis(tmp_path / "tei").items()
    assert all(path.suffix == ".xml" for path in (tmp_path / "tei").iterdir())


def test_an_answer_cut_off_is_none(stub, pdfs, tmp_path):
    stub.plan = {b"%PDF-0": ["cut"], b"%PDF-1": ["cut"] * 3}
    found, listed = run(pdfs[:3], stub.url, tmp_path / "tei")
    assert [pdf.name for pdf in found] == ["0.pdf", "2.pdf"]
    assert found[pdfs[0]].read_bytes() == b"<TEI><text>%PDF-0</text></TEI>"
    assert listed == [(str(pdfs[1]), "GROBID: does not answer (IncompleteRead(15 bytes read))")]


def test_a_pdf_that_kills_grobid_comes_last_at_the_next_start(stub, pdfs, tmp_path):
    stub.killer = b"%PDF-1"
    second = Stub()
    second.killer = stub.killer
    with pytest.raises(ValueError, match="1 of 9 PDFs are done"):
        run(pdfs, stub.url, tmp_path / "tei", concurrency=1)
    with pytest.raises(ValueError, match="8 of 9 PDFs are done"):
        run(pdfs, second.url, tmp_path / "tei", concurrency=1)
    third = Stub()
    assert run(pdfs, third.url, tmp_path / "tei") == (run(pdfs, third.url, tmp_path / "tei")[0], [])
    assert third.sent == {b"%PDF-1": 1}
    assert all(path.suffix == ".xml" for path in (tmp_path / "tei").iterdir())
    third.close()


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)


def test_nobody_there(pdfs, tmp_path, stub):
    address = stub.url
    stub.server.server_close()
    with pytest.raises(ValueError, match=r"^GROBID at http://127.0.0.1:\d+ does not answer \(.*refused\)$"):
        run(pdfs, address, tmp_path / "tei")
    for url in ("127.0.0.1:8070", "file:///etc/passwd", "http://", "http://127.0.0.1:port"):
        with pytest.raises(ValueError, match=r"must be like http://127\.0\.0\.1:8070"):
            run(pdfs, url, tmp_path / "tei")


def test_answers_that_end_the_work(stub, pdfs, tmp_path):
    """A redirect is not followed."""
    for steps, message in [
        ([302] * 9, "answers 302; is the address right"),
        ([503] * 9, r"no thread free \(503, 8 times\)"),
    ]:
        stub.plan = {b"%PDF-0": list(steps)}
        with pytest.raises(ValueError, match=message):
            run(pdfs[:1], stub.url, tmp_path / "tei")
    assert not list((tmp_path / "tei").iterdir())
