"""The page of `k2mini serve` in Chromium, under the server's policy, before a server with canned answers."""

import json
import re
import shutil
import time

import pytest

pytest.importorskip("starlette", reason="the page's tests serve it with starlette")
pytest.importorskip("uvicorn", reason="the page's tests serve it with uvicorn")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

from tests.serving.fake_server import MARKDOWN, PAGE, PLAIN, POLICY, Fake, logprob, serve  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    server = Switch()
    address, stop = serve(server)
    yield server, address
    stop()


class Switch:
    """One port for the module, and a new server behind it for every test."""

    fake = None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            await self.fake(scope, receive, send)


@pytest.fixture
def fake(address):
    address[0].fake = Fake()
    return address[0].fake


@pytest.fixture(scope="module")
def tab(browser):
    """A page that most tests share, each with an empty storage: to open one takes longer than most tests."""
    return browser.new_context().new_page()


@pytest.fixture
def visit(browser, tab, fake, address):
    """Call to open the page; with settings, in a browser of its own. What the console says must have been expected."""
    opened, said, foreign, own = [], [], [], ["data:"]

    def visit(*, stored=None, ready=True, at=address[1], **settings):
        page = browser.new_context(**settings).new_page() if stored or settings else tab
        page.context.set_default_timeout(8000)
        if stored:
            page.add_init_script(f"for (const [k, v] of {json.dumps(list(stored.items()))}) localStorage.setItem(k, v)")
        for event, listener in listeners.items():
            page.on(event, listener)
        opened.append(page)
        own.extend((at, f"blob:{at}"))
        page.goto(at)
        if ready:
            page.locator("#model option").first.wait_for(state="attached")
        return page

    listeners = {
        "console": lambda message: said.append(message.text) if message.type in ("error", "warning") else None,
        "pageerror": lambda error: said.append(str(error)),
        "request": lambda request: None if request.url.startswith(tuple(own)) else foreign.append(request.url),
    }
    visit.expected = ()
    yield visit
    for page in opened:
        if page is not tab:
            page.context.close()
            continue
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        page.evaluate("sessionStorage.clear()")
        page.goto("about:blank")
        where = {"origin": address[1].rstrip("/"), "storageTypes": "all"}
        page.context.new_cdp_session(page).send("Storage.clearDataForOrigin", where)
    assert not foreign
    assert [text for text in said if not any(part in text for part in visit.expected)] == []


def ask(page, text, wait=True):
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        page.locator("#send").wait_for()


def last(page, what=""):
    return page.locator(f".turn:last-child {what}".strip())


def until(page, expression):
    """Wait for an expression to be true. (`wait_for_function` needs `eval`, which the policy forbids.)"""
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(expression)


def chats(fake):
    return [body for path, body in fake.requests if path == "chat"]


def test_nothing_is_read_as_markup():
    """No script sink, no inline style or script, nothing from elsewhere: in any file of the page."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "app.js", "style.css"} <= set(texts)
    for name, text in texts.items():
        assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc", text), (
            name
        )
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)[\w.]+", text), name
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", texts["index.html"])
    assert "unsafe" not in POLICY


@in_browser
def test_an_answer_grows_and_stop_ends_its_request(visit, fake):
    page = visit()
    ask(page, "slow", wait=False)
    body = last(page, ".markdown")
    until(page, "document.querySelector('.markdown')?.textContent.length > 20")
    before = body.text_content()
    until(page, f"document.querySelector('.markdown').textContent.length > {len(before)}")
    page.keyboard.press("Escape")
    page.locator("#send").wait_for()
    for _ in range(100):
        if fake.stopped:
            break
        page.wait_for_timeout(20)
    assert fake.stopped == 1
    kept = body.text_content()
    assert kept.startswith(before)
    expect(last(page, ".answer .acts")).to_contain_text("stopped")
    expect(last(page, ".answer .acts")).to_contain_text(re.compile(r"\d+.tokens · \d+\.\d.tokens/s · first token \d"))
    page.reload()  # what came before the stop is kept
    page.locator("#list .title").click()
    expect(body).to_have_text(kept)


@in_browser
def test_an_answer_left_alone_goes_on(visit, fake):
    """Another conversation is opened while the answer comes; the answer is there on return, and still comes."""
    page = visit()
    ask(page, "slow", wait=False)
    page.locator(".markdown p").wait_for()
    page.click("#new")
    ask(page, "What is granite?")
    assert fake.stopped == 0
    page.get_by_role("button", name="slow", exact=True).click()
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    assert len(last(page, ".markdown").text_content()) > 20


@in_browser
def test_a_closed_page_has_kept_what_came(visit, fake):
    page = visit()
    ask(page, "slow", wait=False)
    expect(last(page, ".markdown")).to_contain_text("A slow")
    page.reload()
    page.locator("#list .title").click()
    assert last(page, ".markdown").text_content().startswith("A slow")


@in_browser
def test_regenerate_edit_and_copy(visit, fake):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "What is granite?")
    ask(page, "And basalt?")
    assert [m["role"] for m in chats(fake)[1]["messages"]] == ["user", "assistant", "user"]
    last(page).get_by_role("button", name="Regenerate").click()
    expect(last(page, ".question")).to_contain_text("2 / 2")
    page.locator("#send").wait_for()
    assert chats(fake)[2]["messages"] == chats(fake)[1]["messages"]

    last(page, ".answer").get_by_role("button", name="Copy").click()
    expect(last(page)).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == PLAIN

    last(page, ".question").hover()
    last(page, ".question").get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("And gabbro?")
    page.keyboard.press("Enter")
    expect(last(page, ".question")).to_contain_text("3 / 3")
    page.locator("#send").wait_for()
    assert chats(fake)[3]["messages"][-1]["content"] == "And gabbro?"
    last(page).get_by_role("button", name="The take before").click()
    expect(last(page, ".said")).to_have_text("And basalt?")

    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("What is schist?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    page.locator("#send").wait_for()
    assert page.locator("#list .title").all_text_contents() == ["What is granite? (edited)", "What is granite?"]
    page.locator("#list .title").last.click()
    expect(page.locator(".turn")).to_have_count(2)


@in_browser
def test_markdown_becomes_nodes(visit):
    page = visit()
    ask(page, "markdown")
    body = last(page, ".markdown")
    expect(body.locator("h4")).to_have_text("Igneous rocks")
    assert body.locator("ol > li").count() == 2
    assert body.locator("ol > li:first-child > ul > li").all_text_contents() == ["granite", "gabbro, Mg-rich"]
    assert body.locator("tbody tr").count() == 2
    expect(body.locator("pre")).to_have_text("def density(mass, volume):\n    return mass / volume")
    assert body.locator("a").evaluate_all("all => all.map((a) => [a.href, a.rel])") == [
        ["https://example.org/rocks", "noopener noreferrer"]
    ]
    expect(body).to_contain_text("javascript:alert(1)")


@in_browser
@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* _d_ `e*f*g`", "<p>a <strong>b</strong> <em>c</em> <em>d</em> <code>e*f*g</code></p>"),
        ("snake_case_name 2*3*4 \\*x\\*", "<p>snake_case_name 2<em>3</em>4 *x*</p>"),
        ("one\ntwo\n\n3. x\n4. y", '<p>one\ntwo</p><ol start="3"><li><p>x</p></li><li><p>y</p></li></ol>'),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote>"),
        ("- a\n\n- b\n\nc", "<ul><li><p>a</p></li><li><p>b</p></li></ul><p>c</p>"),
        ("***\n# H #1", "<hr><h3>H #1</h3>"),
        ("1986. A year", '<ol start="1986"><li><p>A year</p></li></ol>'),
        ("It was\n1986. A year", "<p>It was\n1986. A year</p>"),
        ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
        ("[a](data:text/html,x)", "<p>a (data:text/html,x)</p>"),
    ],
)
def test_markdown_cases(plain, text, html):
    found = plain.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import('./markdown.js');
          const node = document.createElement('div');
          for (let end = 0; end <= text.length; end += 1) renderMarkdown(node, text.slice(0, end)); // as it streams
          return node.innerHTML;
        }""",
        text,
    )
    assert found == html


@pytest.fixture(scope="module")
def plain(browser, address):
    address[0].fake = address[0].fake or Fake()
    page = browser.new_page()
    page.goto(address[1])
    return page


@in_browser
def test_markdown_that_is_meant_to_hang(plain):
    """What would send a careless pattern or a recursion away is drawn in time."""
    longest = plain.evaluate(
        """async () => {
          const { renderMarkdown } = await import('./markdown.js');
          const parts = ['*', '`', '[', '_a', '> ', '- * ', '|-', '![](', '**a ', 'http://', ' \\t', '[a](('];
          const times = parts.map((part) => {
            const text = part.repeat(4000);
            const begun = performance.now();
            renderMarkdown(document.createElement('div'), `|\\n${text}\\n${text}`);
            return performance.now() - begun;
          });
          return Math.max(...times);
        }"""
    )
    assert longest < 3000


@in_browser
def test_markup_in_an_answer_is_inert(visit):
    page = visit()
    ask(page, "image <img src=x onerror='window.hacked = 1'>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#log img, #log script").count() == 0
    expect(last(page, ".markdown")).to_contain_text('<img src="x" onerror="window.hacked = 1">')
    last(page).get_by_role("button", name="Tokens").click()
    assert page.locator("#log img").count() == 0


@in_browser
def test_settings_reach_the_request(visit, fake):
    page = visit()
    ask(page, "What is granite?")
    assert {k: chats(fake)[0][k] for k in ("model", "temperature", "logprobs", "top_logprobs")} == {
        "model": "k2-geo", "temperature": 0.7, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert not {"seed", "top_p", "template", "max_tokens"} & set(chats(fake)[0])
    page.click("#open-settings")
    for name, value in {"temperature": "9", "top_k": "40.4", "seed": "7", "max_tokens": "9999", "min_p": "-1"}.items():
        page.fill(f"#set-{name}", value)
        page.press(f"#set-{name}", "Tab")
    page.fill("#system", "Be brief.")
    page.select_option("#template", "none")
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    page.select_option("#model", "k2-base")
    page.get_by_label("Instruction + input").check()
    page.fill("#question", "Classify the rock.")
    page.fill("#input", "Coarse grains.")
    page.press("#input", "Enter")
    page.locator("#send").wait_for()
    body = chats(fake)[1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Classify the rock.", "input": "Coarse grains."},
    ]
    sent = {k: body.get(k) for k in ("model", "template", "temperature", "top_k", "seed", "min_p", "max_tokens")}
    assert sent == {
        "model": "k2-base",
        "template": "none",
        "temperature": 2,
        "top_k": 40,
        "seed": 7,
        "min_p": 0,
        "max_tokens": 2048,
    }
    page.reload()  # settings stay
    page.locator("#model option").first.wait_for(state="attached")
    assert page.input_value("#model") == "k2-base"
    assert page.input_value("#set-seed") == "7"


CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of layers) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => colour.map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const found = {};
  const all = '.lens td, .soft, .token i, .who, button:not(:disabled), .error, .markdown a';
  for (const node of document.querySelectorAll(all)) {
    if (!node.checkVisibility({ opacityProperty: true })) continue;
    const under = [];
    for (let up = node; up; up = up.parentElement) under.unshift(getComputedStyle(up).backgroundColor);
    const [ink, paper] = [rgb(...under, getComputedStyle(node).color), rgb(...under)].map(light);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    const name = node.className || node.tagName;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}
"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_can_be_read(visit, scheme):
    visit.expected = ("status of 400",)
    page = visit(color_scheme=scheme)

    def dark():
        return page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"

    assert dark() == (scheme == "dark")
    page.click("#compare")
    ask(page, "wrong")
    ask(page, "What is granite?")
    last(page, ".token").nth(3).click()
    page.locator(".lens").wait_for()
    page.evaluate(
        "for (const cell of document.querySelectorAll('.lens td, .token i')) cell.style.setProperty('--a', '1')"
    )
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 5
    assert min(ratios.values()) >= 4.5, ratios
    page.evaluate("for (const cell of document.querySelectorAll('.lens td, .token i')) cell.classList.toggle('n')")
    assert min(page.evaluate(CONTRAST).values()) >= 4.5
    page.click("#theme")
    assert dark() == (scheme == "light")
    page.reload()
    until(page, "document.documentElement.dataset.theme")
    assert dark() == (scheme == "light")


def conversation(turns, **changes):
    answer = {
        "model": "k2-base",
        "text": MARKDOWN,
        "finish": "stop",
        "stats": {"count": 200},
        "prompt": [],
        "tokens": [],
    }
    take = {"content": "How do rocks form?", "input": "", "alone": False, "answers": [answer]}
    return {"title": "Rocks", "at": 1, "system": "", "turns": [{"takes": [take], "shown": 0}] * turns, **changes}


@in_browser
def test_two_hundred_messages_stay_responsive(visit, fake):
    page = visit(
        stored={"k2mini.turns.a": json.dumps(conversation(100)), "k2mini.title.a": '{"title": "Rocks", "at": 1}'}
    )
    page.evaluate(
        """() => {
          window.longest = 0;
          const note = ({ duration }) => { window.longest = Math.max(window.longest, duration); };
          new PerformanceObserver((list) => list.getEntries().forEach(note)).observe({ type: 'longtask' });
        }"""
    )
    page.locator("#list .title").click()
    expect(page.locator(".turn")).to_have_count(100)
    assert page.locator("#log").evaluate("log => log.scrollHeight - log.scrollTop - log.clientHeight < 80")
    opened = page.evaluate("window.longest")
    page.evaluate("window.longest = 0")
    ask(page, "slow", wait=False)
    page.locator(".turn:nth-child(101) .markdown p").wait_for()
    page.evaluate(
        """() => {
          window.elsewhere = 0;
          const last = document.querySelector('.turn:last-child');
          const note = ({ target }) => { window.elsewhere += !last.contains(target); };
          const all = { subtree: true, childList: true, characterData: true, attributes: true };
          new MutationObserver((changes) => changes.forEach(note)).observe(document.getElementById('log'), all);
        }"""
    )
    page.type("#question", "typed while the answer comes")
    assert page.input_value("#question") == "typed while the answer comes"
    until(page, "document.querySelector('.turn:last-child .markdown').textContent.length > 150")
    assert page.evaluate("window.elsewhere") == 0  # a stream touches its own answer and no other
    page.click("#stop")
    assert opened < 2000
    assert page.evaluate("window.longest") < 1000


@in_browser
def test_why_this_token(visit, fake):
    page = visit()
    ask(page, "blanks")
    last(page).get_by_role("button", name="Tokens").click()
    tokens = last(page, ".token")
    assert last(page, ".tokens").text_content() == "One⇥tab<200B> here,⏎\nand␣ two lines."
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(last(page, ".readout")).to_contain_text("⇥")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#why-title")).to_have_text("Why tab")
    expect(page.locator("#why-title")).to_be_focused()
    assert page.locator("#why .bars th").all_text_contents() == ["tab", "␣a", "⏎", "␣the", "<0xE2>"]
    expect(page.locator("#why .bars tr").first).to_contain_text(f"{100 * 2.718281828 ** logprob('k2-geo', 'tab'):.1f}%")
    expect(page.locator(".lens tbody tr")).to_have_count(16)
    (body,) = [body for path, body in fake.requests if path == "why"]
    assert body["model"] == "k2-geo"
    assert [fake.vocabulary[token] for token in body["tokens"]] == ["<s>", "blanks", "One", "\t", "tab"]
    page.keyboard.press("Escape")
    assert page.locator("#why").is_hidden()
    expect(tokens.nth(2)).to_be_focused()
    page.reload()  # the alternatives are gone, the layers can still be read
    page.locator("#list .title").click()
    last(page).get_by_role("button", name="Tokens").click()
    tokens.nth(2).click()
    expect(page.locator(".lens tbody tr")).to_have_count(16)
    assert [body for path, body in fake.requests if path == "why"] == [body, body]


@in_browser
def test_base_beside_adapter(visit, fake):
    page = visit()
    page.click("#compare")
    ask(page, "slow", wait=False)
    until(
        page, "[...document.querySelectorAll('.two .markdown')].filter((n) => n.textContent.length > 20).length === 2"
    )  # both at once
    page.click("#stop")
    page.locator("#send").wait_for()
    ask(page, "What is granite?")
    base, adapter = last(page, ".answer").all()
    expect(base.locator(".markdown")).to_have_text(PLAIN.replace("large enough to be seen", "over thousands of years"))
    assert [name.text_content() for name in last(page, ".who").all()] == ["k2-base", "k2-geo"]
    first, second = chats(fake)[2:]
    assert {first["model"], second["model"]} == {"k2-base", "k2-geo"}
    path, body = fake.requests[-1]
    answer = [fake.vocabulary[token] for token in body["prompt"]][4:]
    assert (path, body["model"], body["echo"], body["max_tokens"]) == ("completions", "k2-base", True, 0)
    assert "".join(answer) == PLAIN
    differences = [logprob("k2-geo", token) - logprob("k2-base", token) for token in answer]
    shown = adapter.locator(".token i").evaluate_all(
        "all => all.map((n) => n.style.getPropertyValue('--a') * (n.className === 'n' ? -1 : 1))"
    )
    assert shown == pytest.approx([max(-1, min(1, d / 4)) for d in differences], abs=0.006)
    adapter.locator(".token").nth(3).hover()
    number = f"{abs(differences[3]):.2f} nats"
    expect(adapter.locator(".readout")).to_contain_text(number)
    expect(adapter.locator(".legend")).to_be_visible()
    page.reload()  # the tint stays
    page.locator("#list .title").click()
    assert last(page, ".answer").last.locator(".token i").nth(3).evaluate("n => n.style.getPropertyValue('--a')")


@in_browser
def test_before_the_server_itself(visit, server):
    """Stop frees the slot, both columns fill, and the lens opens, where a model answers."""

    def busy(number):
        end = time.monotonic() + 20
        while f"k2mini_slots_busy {number}" not in server.ask("/metrics")[2].decode().splitlines():
            assert time.monotonic() < end, server.engine.counts

    page = visit(at=f"{server.url}/", stored={"k2mini.settings": '{"values": {"temperature": 0, "max_tokens": 500}}'})
    assert page.input_value("#model") == "rocks"  # the one that was tuned
    with server.slow(0.1):
        ask(page, "granite", wait=False)
        until(page, "document.querySelector('.markdown')?.textContent.length > 3")
        busy(1)
        page.click("#stop")
        busy(0)
        assert b"\nk2mini_cancelled_total 1\n" in server.ask("/metrics")[2]
    expect(last(page, ".answer .acts")).to_contain_text("stopped")
    page.click("#compare")
    page.click("#open-settings")
    page.fill("#set-max_tokens", "12")
    page.keyboard.press("Escape")
    ask(page, "basalt")
    assert [name.text_content() for name in last(page, ".who").all()] == ["tiny", "rocks"]
    tokens = last(page, ".answer").last.locator(".token i")
    expect(tokens).to_have_count(12)
    shares = tokens.evaluate_all("all => all.map((n) => n.style.getPropertyValue('--a'))")
    assert any(float(share) for share in shares)
    assert all(shares)
    last(page, ".answer").first.get_by_role("button", name="Tokens").click()
    tokens = last(page, ".answer").first.locator(".token")
    expect(tokens).to_have_count(12)
    tokens.nth(4).click()
    expect(page.locator(".lens tbody tr")).to_have_count(3)
    expect(page.locator(".lens tbody tr:last-child td").first).to_have_text("1")  # the last layer chose it


@in_browser
def test_errors_are_messages_with_a_retry(visit, fake):
    visit.expected = ("status of 429", "status of 400", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_INTERNET_DISCONNECTED")
    page = visit()
    ask(page, "busy")
    expect(last(page, ".error")).to_contain_text("The queue is full. (The server asks to wait 2 s.)")
    last(page).get_by_role("button", name="Try again").click()
    expect(last(page, ".markdown")).to_have_text(PLAIN)
    assert page.locator(".turn").count() == 1
    ask(page, "wrong")
    expect(last(page, ".error")).to_contain_text("the prompt has 4000 tokens")
    ask(page, "break")
    expect(last(page, ".error")).to_contain_text("The connection was lost")
    expect(last(page, ".markdown")).to_have_text("Granite is an intrusive igneous")
    assert [m["content"] for m in chats(fake)[-1]["messages"]] == ["busy", PLAIN, "break"]  # what failed is left out
    page.context.set_offline(True)
    ask(page, "What is granite?")
    expect(last(page, ".error")).to_contain_text("can’t be reached")
    page.context.set_offline(False)
    last(page).get_by_role("button", name="Try again").click()
    expect(last(page, ".markdown")).to_have_text(PLAIN)


@in_browser
def test_a_key_is_asked_for_and_kept_in_the_tab(visit, fake):
    visit.expected = ("status of 401",)
    fake.key = "right"
    page = visit(ready=False)
    page.fill("#key", "guess")
    page.keyboard.press("Enter")
    expect(page.locator("#key-text")).to_have_text("That key was refused.")
    page.fill("#key", "right")
    page.get_by_role("button", name="Go on").click()
    page.locator("#model option").first.wait_for(state="attached")
    ask(page, "What is granite?")
    expect(last(page, ".markdown")).to_have_text(PLAIN)
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")
    fake.key = "another"  # changed while the page was open
    page.click("#compare")
    ask(page, "And basalt?", wait=False)
    page.locator("#key-dialog").wait_for()
    page.get_by_role("button", name="Cancel").click()
    expect(last(page, ".error").first).to_contain_text("Incorrect API key")


@in_browser
def test_a_model_that_is_still_loaded_is_waited_for(visit, fake):
    visit.expected = ("status of 503",)
    fake.loading = True
    page = visit(ready=False)
    expect(page.locator("#notice")).to_contain_text("the server is loading")
    page.locator("#model option").first.wait_for(state="attached")
    expect(page.locator("#notice")).to_be_hidden()


@in_browser
def test_a_full_storage_is_said_and_loses_nothing(visit):
    page = visit()
    page.evaluate(
        """() => {
          for (let size = 4e6; size >= 1; size = Math.floor(size / 2)) {
            for (let k = 0; k < 9; k += 1) try { localStorage.setItem(`fill.${size}.${k}`, 'x'.repeat(size)); } catch {}
          }
        }"""
    )
    ask(page, "What is granite?")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    page.click("#new")
    page.locator("#list .title").click()
    expect(last(page, ".markdown")).to_have_text(PLAIN)
    with page.expect_download() as download:
        page.click("#export")
    assert PLAIN in download.value.path().read_text(encoding="utf-8")


@in_browser
def test_damaged_storage(visit):
    damaged = ["{", "null", "7", '{"turns": 3}', '{"turns": [{"takes": [{"answers": [1, null]}]}, 5, null]}']
    stored = {f"k2mini.{kind}.{place}": text for place, text in enumerate(damaged) for kind in ("turns", "title")}
    page = visit(stored={**stored, "k2mini.settings": '{"values": 3, "model": [], "theme": 5, "compare": {}}'})
    assert page.locator("#list .title").count() == 5
    for place in range(5):
        page.locator("#list .title").nth(place).click()
    page.click("#new")
    ask(page, "What is granite?")
    expect(last(page, ".markdown")).to_have_text(PLAIN)


@in_browser
def test_conversations_are_renamed_deleted_exported_imported(visit, tmp_path):
    page = visit()
    ask(page, "What is granite?")
    page.click("#new")
    ask(page, "What is basalt?")
    titles = page.locator("#list .title")
    assert titles.all_text_contents() == ["What is basalt?", "What is granite?"]
    page.get_by_role("button", name="Rename What is basalt?").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("Dark rocks")
    page.keyboard.press("Enter")
    expect(titles.first).to_have_text("Dark rocks")

    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text(encoding="utf-8"))["conversations"]
    assert [one["title"] for one in exported] == ["Dark rocks", "What is granite?"]
    assert exported[0]["turns"][0]["takes"][0]["answers"][0]["text"] == PLAIN

    page.locator("#list li").first.hover()
    page.get_by_role("button", name="Delete Dark rocks").click()
    expect(titles).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_count(2)
    expect(last(page, ".markdown")).to_have_text(PLAIN)

    page.set_input_files("#file", file)
    expect(titles).to_have_count(4)
    other = tmp_path / "other.json"
    other.write_text("[1, 2]", encoding="utf-8")
    page.set_input_files("#file", other)
    expect(page.locator("#notice")).to_contain_text("not an export")


@in_browser
def test_two_tabs(visit, address):
    """What one tab saves the other shows; neither loses the other's."""
    page = visit(color_scheme="light")  # a browser of its own
    other = page.context.new_page()
    other.goto(address[1])
    other.locator("#model option").first.wait_for(state="attached")
    ask(other, "What is basalt?")
    expect(page.locator("#list .title")).to_have_count(1)
    page.bring_to_front()  # of what is hidden, little is drawn
    page.locator("#list .title").click()
    ask(page, "And gabbro?")
    expect(other.locator(".turn")).to_have_count(2)
    ask(page, "slow", wait=False)  # both go on at once: neither overwrites the other
    page.locator(".turn:nth-child(3) .markdown p").wait_for()
    expect(other.locator(".turn")).to_have_count(3)
    ask(other, "And schist?")
    expect(page.locator("#list .title")).to_have_count(2)
    page.click("#stop")
    page.locator("#send").wait_for()
    expect(page.locator(".said").last).to_have_text("slow")
    expect(other.locator(".said").last).to_have_text("And schist?")
    assert sorted(page.evaluate("Object.values(localStorage).map((text) => JSON.parse(text).turns?.length ?? 0)"))[
        -2:
    ] == [3, 4]


@in_browser
def test_phone_width(visit):
    page = visit(viewport={"width": 360, "height": 640})

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") == 360

    page.click("#compare")
    ask(page, "markdown")
    assert fits()
    assert page.locator("#log").evaluate("log => log.scrollWidth <= log.clientWidth")
    last(page, ".token").first.click()
    page.locator(".lens").wait_for()
    assert fits()
    page.locator("#why .close").click()
    page.click("#open-settings")
    assert fits()
    page.keyboard.press("Escape")
    assert not page.locator("#new").is_visible()
    page.click("#menu")
    page.click("#new")
    expect(page.locator("#welcome")).to_be_visible()
    assert not page.locator("#new").is_visible()


@in_browser
def test_keyboard_and_screen_reader(visit):
    page = visit()
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("#finished")).to_have_text(f"k2-geo: {PLAIN}")
    assert page.locator("#log").get_attribute("aria-live") == "off"
    expect(last(page, ".said")).to_have_text("one\ntwo")
    last(page).get_by_role("button", name="Tokens").click()
    page.click("#open-settings")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, textarea, input, a, [tabindex]')]
          .filter((n) => n.checkVisibility({ visibilityProperty: true }) && n.tabIndex >= 0)
          .filter((n) => !(n.ariaLabel || n.labels?.length || n.textContent.trim())).map((n) => n.outerHTML)"""
    )
    assert nameless == []
    page.locator("#question").focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
            )
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if "skip" in reached:
            break
    assert {"new", "model", "compare", "theme", "log", "Copy", "Edit", "token"} <= reached
