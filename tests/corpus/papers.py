"""Files of papers for the tests of the readers, of words that are each given once, so that none can be missed."""

import io
import itertools


class Words:
    """Gives new words of letters and remembers them."""

    def __init__(self):
        self.given, self._next = [], itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou", "lmnrst")

    def __call__(self, count=6):
        new = ["".join(next(self._next)) for _ in range(count)]
        self.given += new
        return " ".join(new)


TEI_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<TEI xml:space="preserve" xmlns="http://www.tei-c.org/ns/1.0" '
    'xmlns:xlink="http://www.w3.org/1999/xlink">'
)


def tei(body, title="", abstract="", back="", works="", header=""):
    titles = f'<title level="a" type="main">{title}</title>'
    return (
        f"{TEI_HEAD}<teiHeader xml:lang='en'><fileDesc><titleStmt>{titles}</titleStmt>{header}"
        f"<sourceDesc><biblStruct><analytic>{titles}</analytic><monogr><imprint><date/></imprint></monogr></biblStruct>"
        f"</sourceDesc></fileDesc><profileDesc><abstract>{abstract}</abstract></profileDesc></teiHeader>"
        f"<text xml:lang='en'><body>{body}</body><back>{back}<div type='references'><listBibl>{works}</listBibl></div>"
        "</back></text></TEI>"
    ).encode()


def work(name, title, author="", year="1999", extra=""):
    people = (
        f"<author><persName><forename>A</forename><surname>{author}</surname></persName></author>" if author else ""
    )
    return (
        f'<biblStruct xml:id="{name}"><analytic><title level="a" type="main">{title}</title>{people}</analytic>'
        f'<monogr><title level="j"/><imprint><date type="published" when="{year}"/></imprint>'
        f"</monogr>{extra}</biblStruct>"
    )


def jats(body, title="", abstract="", back="", meta="", doctype=""):
    return (
        f'<?xml version="1.0"?>{doctype}<article xmlns:xlink="http://www.w3.org/1999/xlink" '
        'xmlns:mml="http://www.w3.org/1998/Math/MathML"><front><journal-meta><journal-title>J</journal-title>'
        f"</journal-meta><article-meta><title-group><article-title>{title}</article-title>"
        f"</title-group>{meta}{abstract}"
        f"</article-meta></front><body>{body}</body>{back}</article>"
    ).encode()


def html(body, head=""):
    return f"<!DOCTYPE html><html><head><meta charset='utf-8'>{head}</head><body>{body}</body></html>".encode()


def pdf(paragraphs, columns=1, header="", **options):
    """Paragraphs on A4, broken into lines and columns by reportlab, a header and a page number on each page."""
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Paragraph

    def edges(canvas, document):
        if header:
            canvas.drawString(40, A4[1] - 25, header)
            canvas.drawString(300, 15, str(document.page))

    buffer, width = io.BytesIO(), (A4[0] - 60) / columns
    document = BaseDocTemplate(buffer, pagesize=A4, invariant=1, **options)
    frames = [Frame(30 + n * width, 40, width - 10, A4[1] - 80) for n in range(columns)]
    document.addPageTemplates(PageTemplate(frames=frames, onPage=edges))
    style = getSampleStyleSheet()["Normal"]
    document.build([Paragraph(text, style) for text in paragraphs])
    return buffer.getvalue()


def pdf_lines(pages, encrypt=None, **info):
    """Lines at given places: pages of (x, y, text)."""
    from reportlab.pdfgen import canvas

    buffer = io.BytesIO()
    drawn = canvas.Canvas(buffer, encrypt=encrypt, invariant=1)
    if info:
        drawn.setTitle(info["title"])
        drawn.setSubject(info.get("subject", ""))
    for lines in pages:
        for x, y, text in lines:
            drawn.drawString(x, y, text)
        drawn.showPage()
    drawn.save()
    return buffer.getvalue()
