"""PDFs to TEI by a GROBID of the user's, over its REST API (GROBID's documentation, "GROBID Service API")."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit

from k2mini.corpus.readers import name_of
from k2mini.files import new_file, sha256, write_text

TIMEOUT = 180.0  # seconds without a byte, as GROBID's own client has it
PAUSE = 5.0  # seconds before a request is tried again, doubled each time up to a minute
TRIES = 8  # of a request where all of GROBID's threads are taken (503); of one without an answer, 3
_FIELDS = {"consolidateHeader": "0", "consolidateCitations": "0", "includeRawCitations": "1"}  # no call to CrossRef


class _Dead(Exception):
    """No PDF will get an answer, and why."""


def process(
    pdfs: Sequence[Path], url: str, folder: Path, *, concurrency: int = 4, on_error: Callable[[str, str], None]
) -> dict[Path, Path]:
    """PDF -> its TEI, a file in `folder` named by the PDF's SHA-256; what is there is not asked for again.

    Args:
        concurrency: requests at a time; not more than the server's `concurrency` is best.
        on_error: called, in this thread, with the PDF and the reason where GROBID can't read it. The reason stays in
            `folder` as well (NAME.error); remove that file to have the PDF sent again.

    Raises ValueError where `url` is none or nobody answers there; what was done until then is kept.
    """
    if not re.match(r"https?://[^\s/:@]+(:\d+)?(/\S*)?$", url):
        raise ValueError(f"GROBID's address must be like http://127.0.0.1:8070, not {url!r}")
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    names: dict[Path, str] = {}

    def unasked() -> Iterator[Path]:
        sent: set[str] = set()
        for pdf in pdfs:
            try:
                names[pdf] = name = sha256(pdf)
            except OSError as error:
                on_error(name_of(pdf), error.strerror or str(error))
                continue
            there = any((folder / f"{name}{suffix}").exists() for suffix in (".tei.xml", ".error"))
            if name not in sent and not there:
                sent.add(name)
                yield pdf

    def settle(futures: set[Future[None]]) -> set[Future[None]]:
        done, left = wait(futures, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        return left

    with ThreadPoolExecutor(concurrency) as pool:
        running: set[Future[None]] = set()
        try:
            for pdf in unasked():
                running.add(pool.submit(_one, pdf, folder / names[pdf], url, stop))
                if len(running) >= concurrency:
                    running = settle(running)
            while running:
                running = settle(running)
        except _Dead as error:
            stop.set()
            wait(running)
            done = sum((folder / f"{name}.tei.xml").exists() for name in set(names.values()))
            kept = f"; {done} of {len(pdfs)} PDFs are done and kept in {folder}, start again to go on"
            raise ValueError(f"GROBID at {url} {error}{kept if done else ''}") from None
        finally:
            stop.set()
    found = {}
    for pdf, name in names.items():
        if (tei := folder / f"{name}.tei.xml").exists():
            found[pdf] = tei
        else:
            on_error(name_of(pdf), (folder / f"{name}.error").read_text(encoding="utf-8"))
    return found


def _one(pdf: Path, place: Path, url: str, stop: threading.Event) -> None:
    """Have a PDF's TEI, or the reason that there is none, in a file. Raises _Dead where nobody answers."""
    content, silent = pdf.read_bytes(), 0
    for attempt in range(TRIES):
        if attempt and stop.wait(min(PAUSE * 2 ** (attempt - 1), 60)):
            raise _Dead("was left")
        try:
            status, answer = _request(url, place.name, content)
        except (OSError, http.client.HTTPException) as error:
            reason, silent = f"does not answer ({error or type(error).__name__})", silent + 1
            if silent < 3:
                continue
            try:
                _request(url)
            except (OSError, http.client.HTTPException):
                raise _Dead(reason) from None
            status, answer = 0, reason.encode()  # it answers, but not to this PDF
        if status == 503:
            continue
        if 300 <= status < 400 or status in (401, 403, 404, 405):
            raise _Dead(f"answers {status}; is the address right?")
        if status == 200 and b"<TEI" in answer[:4096]:
            with new_file(place.with_name(f"{place.name}.tei.xml")) as beside:
                beside.write_bytes(answer)
        else:
            said = re.sub(r"<[^>]*>|\s+", " ", answer[:500].decode(errors="replace")).strip()
            write_text(
                place.with_name(f"{place.name}.error"),
                f"GROBID: {status} {said or 'no text found'}".replace(" 0 ", " "),
            )
        return
    raise _Dead(f"has no thread free (503, {TRIES} times)")


def _request(url: str, name: str = "", content: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a request, whether it is alive or for the TEI of a PDF. No redirect is followed."""
    server = urlsplit(url)
    kind = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
    connection = kind(server.hostname or "", server.port, timeout=TIMEOUT)
    head = f'--{name}\r\nContent-Disposition: form-data; name="'
    fields = "".join(f'{head}{field}"\r\n\r\n{value}\r\n' for field, value in _FIELDS.items())
    fields += f'{head}input"; filename="{name}.pdf"\r\nContent-Type: application/pdf\r\n\r\n'
    form = {"Content-Type": f"multipart/form-data; boundary={name}", "Accept": "application/xml"}
    base = server.path.rstrip("/")
    try:
        if content is None:
            connection.request("GET", f"{base}/api/isalive")
        else:
            body = fields.encode() + content + f"\r\n--{name}--\r\n".encode()
            connection.request("POST", f"{base}/api/processFulltextDocument", body, form)
        response = connection.getresponse()
        return response.status, response.read(2**28)
    finally:
        connection.close()
