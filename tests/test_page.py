"""The chat page in a browser, against a server that keeps the contract and does what a test asks for."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
from bundles import make_drafter, make_folder

import mlx_redrafter

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
expect = playwright.expect
expect.set_options(timeout=20_000)  # the machine may be busy with other tests

PAGE = Path(mlx_redrafter.__file__).parent / "server" / "page"
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", MAC)
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: none of {', '.join(NAMES)}")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
RICH = """# Rivers

A **bold**, *slanted* and `plain` [link](https://example.com/a_(b)), snake_case_name and 2 * 3 * 4.

1. first
   - within, and **more**
2. second

> quoted

| name | length |
|------|-------:|
| Rhine a\\|b | 1233 |

```python
for x in range(3):
    print(x * 2 * 2)
```
The end."""
SAYS = "Hé🙂好w!xyzkq0123456789"  # no token twice
HOSTILE = """<img src=x onerror="window.hurt=1"> <script>window.hurt=1</script>
[press](javascript:window.hurt=1) [data](data:text/html,x) ![picture](https://other.example/x.png)
| <b>a</b> |
|--|
| <i>c</i> |
"""


class Stub(BaseHTTPRequestHandler):
    """Answers with what ``server.says`` has for the last message: pieces, or a function of this handler."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, kind="application/json", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "code": None}
        self.reply(json.dumps({"error": error}).encode(), status=status)

    def known(self):
        key = self.server.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def do_GET(self):
        path = PAGE / (self.path.removeprefix("/page/") if self.path != "/" else "index.html")
        if self.path == "/v1/models":
            if not self.known():
                return self.refuse(401, "wrong key")
            models = [
                {"id": name, "object": "model", "owned_by": "local"} for name in ("org/tiny", "org/other")
            ]
            return self.reply(json.dumps({"object": "list", "data": models}).encode())
        if path.parent != PAGE or not path.is_file():
            return self.refuse(404, "no such page")
        return self.reply(path.read_bytes(), TYPES[path.suffix])

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.known():
            return self.refuse(401, "wrong key")
        self.server.requests.append(request)
        answer = self.server.says[request["messages"][-1]["content"]]
        if callable(answer):
            return answer(self)
        self.begin()
        for piece in answer:
            self.say(piece)
        return self.end()

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})

    def event(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def say(self, pieces):
        text = "".join(text for text, _ in pieces)
        self.event(
            {
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
                "drafted": [list(piece) for piece in pieces],
            }
        )

    def end(self, **usage):
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        speed = 30.0 if self.server.requests[-1]["draft"] is False else 90.0
        usage = {
            "prompt_tokens": 40,
            "completion_tokens": 24,
            "total_tokens": 64,
            "prompt_tokens_details": {"cached_tokens": 32},
            "accepted_tokens": 16,
            "tokens_per_step": 3.0,
            "tokens_per_second": speed,
            **usage,
        }
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")


def pieces(text, size=5):
    """A text in steps of three pieces, of which the first two were drafted."""
    cut = [text[at : at + size] for at in range(0, len(text), size)]
    marked = [(piece, at % 3 != 2) for at, piece in enumerate(cut)]
    return [marked[at : at + 3] for at in range(0, len(marked), 3)]


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    server.key, server.requests = None, []
    server.says = {"Rivers?": pieces(RICH), "Hello": pieces("Good day to you."), "Hurt me": pieces(HOSTILE)}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A fresh browser's page, whose errors and requests to elsewhere fail the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 720})
    context.set_default_timeout(20_000)
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.origins = [server.url]
    page.on(
        "request", lambda request: wrong.append(request.url) if origin(request) not in page.origins else None
    )
    page.allowed = ()  # what the console may say: Chromium reports each refused request there
    page.goto(server.url)
    yield page
    context.close()
    assert not [text for text in wrong if not any(allowed in text for allowed in page.allowed)]


def origin(request):
    return "/".join(request.url.split("/")[:3])


def ask(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def answered(page):
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    return page.get_by_role("article", name="Answer").last


def look(page, name):
    """Keep a picture for who wants to look at it."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_conversation_shows_markdown(page, server):
    expect(page.get_by_label("Model")).to_have_value("org/tiny")
    look(page, "welcome")
    ask(page, "Rivers?")
    answer = answered(page)
    expect(answer.get_by_role("heading", name="Rivers")).to_be_visible()
    expect(answer.locator("strong").first).to_have_text("bold")
    expect(answer.locator("em")).to_have_text("slanted")
    expect(answer.get_by_role("link")).to_have_attribute("href", "https://example.com/a_(b)")
    expect(answer.get_by_role("link")).to_have_attribute("rel", "noopener noreferrer")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol > li ul > li")).to_have_text("within, and more")
    expect(answer.locator("blockquote")).to_have_text("quoted")
    expect(answer.locator("td")).to_have_text(["Rhine a|b", "1233"])
    expect(answer.locator("pre")).to_have_text("for x in range(3):\n    print(x * 2 * 2)")
    expect(answer.locator("p").first).to_contain_text("snake_case_name and 2 * 3 * 4.")
    expect(answer.locator(".figures")).to_have_text(
        re.compile(
            r"24 tokens · 90\.0 tokens/s · 3\.00 tokens per step · 67 % drafted · first after \d\.\d\d s"
            r" · 32 of 40 prompt tokens cached"
        )
    )
    expect(page.locator("#status")).to_contain_text("The end.")  # said once, when it is all there
    look(page, "light")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "for x in range(3):\n    print(x * 2 * 2)"
    answer.get_by_role("button", name="Copy answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == RICH
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Rivers?"}]
    assert server.requests[0]["stream_options"] == {"include_usage": True}


def test_drafted_words_are_shown_also_within_markdown(page, server):
    server.says["Marks"] = [
        [("Of **it", True), (" all", True), ("**", False)],
        [(", `co", False)],
        [("de`\n- on", True), ("e", False)],
    ]
    ask(page, "Marks")
    answer = answered(page)
    expect(answer.locator(".drafted")).to_have_text(["Of ", "it all", "de", "on"])
    expect(answer.locator("strong")).to_have_text("it all")
    expect(answer.locator("code")).to_have_text("code")
    style = "e => getComputedStyle(e).textDecorationLine + ' ' + getComputedStyle(e).color"
    shown = answer.locator(".drafted").first.evaluate(style)
    assert shown.startswith("underline")  # not in colour alone
    page.get_by_label("Show drafted words").uncheck()
    hidden = answer.locator(".drafted").first.evaluate(style)
    assert hidden.startswith("none") and hidden.split(" ", 1)[1] != shown.split(" ", 1)[1]


def test_what_a_model_says_stays_text(page):
    ask(page, "Hurt me")
    answer = answered(page)
    expect(answer.locator("img, script, td > b, td > i, th > b")).to_have_count(0)
    expect(answer).to_contain_text('<img src=x onerror="window.hurt=1"> <script>window.hurt=1</script>')
    expect(answer).to_contain_text("[press](javascript:window.hurt=1) [data](data:text/html,x)")
    expect(answer.get_by_role("link")).to_have_count(1)  # of the picture, which is not loaded
    assert page.evaluate("window.hurt") is None


def test_marks_follow_their_characters_through_any_markdown(page):
    """Random texts, capitals drafted: grown as if shown at once, with no attribute but the page's own."""
    parts = ["a", "B", "c D ", "*", "**", "_", "`", "```", "\n", "\n\n", "- ", "1. ", "    ", "> ", "# ", "|"]
    parts += ["|-|-|\n", "[e](", "http://f.G", ")", "![H](x)", "\\", "~~", "---", "<i>", "\t", "javascript:"]
    random = Random(7)
    texts = ["".join(random.choices(parts, k=30)) for _ in range(700)]
    wrong = page.evaluate(
        """async (texts) => {
          const { render } = await import("/page/markdown.js");
          const known = "class type aria-label data-copy start scope style href rel target".split(" ");
          return texts.filter((text) => {
            const marks = text.replace(/[^]/g, (c) => (/[A-Z]/.test(c) ? "1" : "0"));
            const [grown, whole] = [document.createElement("div"), document.createElement("div")];
            for (let at = 0; at < text.length; at += 7) render(grown, text.slice(0, at), marks.slice(0, at));
            for (const shown of [grown, whole]) render(shown, text, marks);
            if (grown.innerHTML !== whole.innerHTML) return true;
            const all = [...whole.querySelectorAll("*")];
            if (!all.flatMap((e) => e.getAttributeNames()).every((name) => known.includes(name))) return true;
            if (all.some((e) => e.href !== undefined && new URL(e.href).protocol !== "http:")) return true;
            whole.querySelectorAll("figcaption").forEach((e) => e.remove()); // a language has no marks
            const drafted = [...whole.querySelectorAll(".drafted")].map((e) => e.textContent).join("");
            return drafted !== whole.textContent.replace(/[^A-Z]/g, "");
          });
        }""",
        texts,
    )
    assert not wrong[:3]


def test_deep_and_endless_markdown_takes_no_time(page, server):
    server.says["Deep"] = [
        [(line * 4000 + "\n\n", False)] for line in ("> ", "- ", "**a ", "[", "`a ", "| - ", "_a", "![](")
    ]
    begun = time.monotonic()
    ask(page, "Deep")
    answered(page)
    assert time.monotonic() - begun < 10


def test_an_answer_is_stopped_in_its_middle_and_made_again(page, server):
    gone = threading.Event()

    def forever(stub):
        stub.begin()
        stub.wfile.write(b": keepalive 256/1024\n\n")
        stub.wfile.flush()
        time.sleep(0.3)
        try:
            while True:
                stub.say([("on ", True), ("and ", False)])
                time.sleep(0.02)
        except OSError:
            gone.set()

    server.says["Go on"] = forever
    ask(page, "Go on")
    figures = page.get_by_role("article", name="Answer").locator(".figures")
    expect(figures).to_have_text("Reading the prompt: 256 of 1024 tokens …")
    expect(figures).to_have_text(re.compile(r"tokens/s · 2\.00 tokens per step · 50 % drafted$"))  # live
    expect(page.get_by_role("article", name="Answer")).to_contain_text("on and on and on")
    look(page, "streaming")
    page.keyboard.press("Escape")
    expect(answered(page).locator(".figures")).to_contain_text("stopped")
    assert gone.wait(10)  # the server is told, and need not go on
    server.says["Go on"] = pieces("To the end.")
    page.get_by_role("button", name="Regenerate").click()
    expect(answered(page)).to_contain_text("To the end.")
    expect(page.get_by_role("article", name="Answer")).to_have_count(1)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Go on"}]
    server.says["Go on"] = forever
    ask(page, "Go on")
    expect(page.get_by_role("article", name="Answer").last).to_contain_text("on and on")
    page.get_by_role("button", name="Stop").click()
    expect(answered(page).locator(".figures")).to_contain_text("stopped")
    assert [m["role"] for m in server.requests[2]["messages"]] == ["user", "assistant", "user"]


def test_what_is_shown_already_stays_while_more_comes(page, server):
    go = threading.Event()

    def halves(stub):
        stub.begin()
        stub.say([("```\nfirst\n```\n\nsecond", False)])
        go.wait(20)
        stub.say([(" half", True)])
        stub.end()

    server.says["Halves"] = halves
    ask(page, "Halves")
    page.get_by_role("button", name="Copy code").focus()
    go.set()
    expect(answered(page)).to_contain_text("second half")
    expect(page.get_by_role("button", name="Copy code")).to_be_focused()


def test_conversations_are_kept_and_deleted(page, server):
    ask(page, "Hello")
    answered(page)
    page.reload()
    expect(page.get_by_role("article", name="Answer")).to_contain_text("Good day to you.")
    expect(page.locator(".assistant .drafted").first).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("article", name="Answer")).to_have_count(0)
    ask(page, "Rivers?")
    answered(page)
    chats = page.get_by_role("navigation", name="Conversations")
    expect(chats.get_by_role("listitem")).to_have_count(2)
    expect(chats.locator("[aria-current=true]")).to_have_text("Rivers?")
    chats.get_by_role("button", name="Hello", exact=True).click()
    expect(page.get_by_role("article", name="Answer")).to_contain_text("Good day to you.")
    page.on("dialog", lambda dialog: dialog.accept())
    chats.get_by_role("button", name="Delete “Hello”").click()
    expect(page.get_by_role("article", name="Answer")).to_contain_text("The end.")
    page.reload()
    expect(chats.get_by_role("listitem")).to_have_count(1)


def test_an_answer_goes_on_while_another_conversation_is_read(page, server):
    go = threading.Event()

    def slow(stub):
        stub.begin()
        stub.say([("Begun", False)])
        go.wait(20)
        stub.say([(" and done.", True)])
        stub.end()

    server.says["Slow"] = slow
    ask(page, "Slow")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("Begun")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Hello")
    expect(answered(page)).to_contain_text("Good day to you.")
    go.set()
    page.get_by_role("button", name="Slow", exact=True).click()
    expect(answered(page)).to_contain_text("Begun and done.")


def test_both_speeds_are_shown_once_both_are_known(page, server):
    ask(page, "Hello")
    answered(page)
    assert server.requests[-1]["draft"] is True
    expect(page.get_by_label("Last speeds")).to_have_text("on 90.0 tokens/s")
    page.get_by_label("Draft", exact=True).uncheck()
    ask(page, "Hello")
    expect(answered(page).locator(".figures")).to_contain_text("drafting off")
    assert server.requests[-1]["draft"] is False
    expect(page.get_by_label("Last speeds")).to_have_text("on 90.0 · off 30.0 tokens/s · 3.00 ×")
    page.reload()
    expect(page.get_by_label("Last speeds")).to_have_text("on 90.0 · off 30.0 tokens/s · 3.00 ×")
    expect(page.get_by_label("Draft", exact=True)).not_to_be_checked()
    page.get_by_label("Model").select_option("org/other")
    expect(page.get_by_label("Last speeds")).to_have_text("")


def test_settings_are_sent_and_kept(page, server):
    ask(page, "Hello")
    answered(page)
    assert server.requests[0].keys() == {
        "model",
        "messages",
        "stream",
        "stream_options",
        "draft",
    }  # nothing unset
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Most tokens of an answer").fill("77")
    page.get_by_label("Seed").fill("0")
    look(page, "settings")
    page.get_by_role("button", name="Done").click()
    page.reload()
    page.get_by_label("Model").select_option("org/other")
    ask(page, "Hello")
    answered(page)
    request = server.requests[-1]
    wanted = {"model": "org/other", "temperature": 0.5, "top_p": 0.9, "max_tokens": 77, "seed": 0}
    assert wanted.items() <= request.items()
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_key_is_asked_for_where_the_server_wants_one(page, server):
    page.allowed = ("401",)
    server.key = "secret"
    page.reload()
    for key, title in (("wrong", "This server wants a key"), ("secret", "did not accept")):
        expect(page.get_by_role("dialog", name=title)).to_be_visible()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Continue").click()
    expect(page.get_by_label("Model")).to_have_value("org/tiny")
    expect(page.get_by_role("dialog")).to_have_count(0)
    ask(page, "Hello")
    expect(answered(page)).to_contain_text("Good day to you.")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("org/tiny")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_errors_are_shown_where_the_answer_would_be(page, server):
    page.allowed = ("429",)
    server.says["Hello"] = lambda stub: stub.refuse(429, "The queue is full: try again in 3 seconds.")
    ask(page, "Hello")
    alert = answered(page).get_by_role("alert")
    expect(alert).to_have_text("The queue is full: try again in 3 seconds.")

    def breaks(stub):
        stub.begin()
        stub.say([("Half an", False)])
        stub.event({"error": {"message": "Out of memory.", "type": "server_error", "code": None}})

    server.says["Hello"] = breaks
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_have_text("Out of memory.")
    expect(answered(page)).to_contain_text("Half an")
    look(page, "error")

    def ends(stub):
        stub.begin()
        stub.say([("Half", False)])

    server.says["Hello"] = ends
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("broke off")
    server.says["Hello"] = pieces("Good day.")
    page.get_by_role("button", name="Try again").click()
    expect(answered(page)).to_contain_text("Good day.")
    expect(answered(page).get_by_role("alert")).to_have_count(0)
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_thoughts_are_folded_away(page, server):
    def thinks(stub):
        stub.begin()
        stub.event(
            {
                "choices": [{"index": 0, "delta": {"reasoning": "Let me think.", "content": "So"}}],
                "drafted": [["So", True]],
                "drafted_reasoning": [["Let me", True], [" think.", False]],
            }
        )
        stub.event({"choices": [{"index": 0, "delta": {"content": " be it."}, "finish_reason": "length"}]})
        stub.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}})
        stub.wfile.write(b"data: [DONE]\n\n")

    server.says["Think"] = thinks
    ask(page, "Think")
    answer = answered(page)
    expect(answer.get_by_text("So be it.")).to_be_visible()  # its second half without marks
    expect(answer.get_by_text("Let me think.")).not_to_be_visible()
    expect(answer.locator(".drafted")).to_have_text(["Let me", "So"])
    answer.get_by_text("Thoughts").click()
    expect(answer.get_by_text("Let me think.")).to_be_visible()
    expect(answer.locator(".figures")).to_contain_text("cut at the most tokens allowed")
    ask(page, "Hello")
    answered(page)
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "So be it."}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(page, server, theme):
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme=theme)
    server.says["Wide"] = pieces(
        "a" * 200 + "\n\n```\n" + "b" * 200 + "\n```\n\n|" + "long head|" * 9 + "\n|" + "-|" * 9, 40
    )
    ask(page, "Rivers?")
    answered(page)
    page.get_by_label("Draft", exact=True).uncheck()
    ask(page, "Wide")
    answered(page)
    look(page, f"phone-{theme}-wide")
    for part in ("html", "#log"):
        assert page.locator(part).evaluate("e => e.scrollWidth <= e.clientWidth")
    page.locator("#log").evaluate("e => { e.scrollTop = 0; }")
    look(page, f"phone-{theme}")
    page.get_by_role("button", name="Conversations").click()
    look(page, f"phone-{theme}-menu")
    expect(page.get_by_role("button", name="New conversation")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New conversation")).not_to_be_visible()


def test_light_and_dark_are_readable(page):
    """Text has a contrast of 4.5 with its ground, in the theme of the system and in the one chosen."""
    ask(page, "Rivers?")
    answer = answered(page)
    luminance = """e => {
      const of = (color) => {
        const context = document.createElement('canvas').getContext('2d');
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(
          (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      let ground = e;
      while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
      return [of(getComputedStyle(e).color), of(getComputedStyle(ground).backgroundColor)];
    }"""
    grounds = []
    for theme in ("light", "dark"):
        drafted = answer.locator(".drafted").all()
        others = [
            answer.locator(css).first
            for css in ("p", "pre code", "a", ".figures", "figcaption span", "footer button")
        ]
        for place in [
            *drafted,
            *others,
            page.get_by_role("button", name="Send"),
            page.locator("#list button").first,
        ]:
            text, ground = place.evaluate(luminance)
            assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5, (theme, place)
        grounds.append(ground)
        page.get_by_role("button", name="Switch between light and dark").click()
        look(page, f"after-{theme}")
    assert grounds[0] > 0.5 > grounds[1]
    page.emulate_media(color_scheme="dark")  # what was chosen goes before what the system wants, and is kept
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"


def test_everything_to_press_has_a_name_and_is_reached_by_keyboard(page):
    ask(page, "Rivers?")
    answered(page)
    page.get_by_role("button", name="Settings").click()
    snapshots = [page.get_by_role("dialog").aria_snapshot()]
    page.keyboard.press("Escape")
    snapshots.append(page.locator("body").aria_snapshot())
    roles = r"- (button|link|textbox|combobox|switch|spinbutton|checkbox)\b(?! \")"
    assert not [line for shot in snapshots for line in shot.splitlines() if re.search(roles, line)]
    for landmark in ("navigation", "banner", "main"):
        assert f"- {landmark}" in snapshots[1]
    page.get_by_label("Your message").focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Your message")).to_have_value("One\ntwo")
    names = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        names.add(
            page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()")
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or page.evaluate("document.activeElement === document.body")
    assert {"Send", "Settings", "New conversation", "Copy code", "Regenerate", "Model"} <= names


@pytest.fixture
def real(tmp_path):
    """`mlx-redrafter serve` with a model that says SAYS after the prompt, and its drafter: its address."""
    base = make_folder(tmp_path / "base", SAYS)
    drafter = make_drafter(tmp_path / "drafter", base)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<says>", "<assistant>"))  # as usual ones have it
    command = [sys.executable, "-m", "mlx_redrafter", "serve", "--model", base, "--drafter", drafter]
    log = tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen([*command, "--port", "0"], stderr=written)
    while not (found := re.search(r"http://\S+(?=\n)", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    yield found[0]
    process.terminate()
    process.wait(60)


def test_the_server_itself_keeps_the_contract(page, real):
    """Its page, its policy and its answers."""
    page.origins.append(real)
    page.goto(real)
    expect(page.get_by_label("Model")).to_have_value(re.compile("base$"))
    for drafting in (True, False):
        page.get_by_label("Draft", exact=True).set_checked(drafting)
        with page.expect_response("**/v1/chat/completions") as response:
            ask(page, f"the quick brown fox {drafting}")
        answer = answered(page)
        expect(answer.locator(".markdown").last).to_have_text(SAYS)
        expect(answer.get_by_role("alert")).to_have_count(0)
        expect(answer.locator(".figures")).to_contain_text("tokens per step" if drafting else "drafting off")
        expect(answer.locator(".figures")).to_contain_text("prompt tokens cached")
        chunks = [json.loads(data) for data in re.findall(r"^data: (\{.*)", response.value.text(), re.M)]
        pieces = [piece for chunk in chunks for piece in chunk.get("drafted", [])]
        assert "".join(text for text, _ in pieces) == SAYS
        drafted = "".join(
            text for text, drafted in pieces if drafted
        )  # how many, the machine's speed decides
        assert "".join(answer.locator(".drafted").all_text_contents()) == drafted
        assert drafting or not drafted
    expect(page.get_by_label("Last speeds")).to_have_text(re.compile(r"^on .* off .*×$"))
    look(page, "real")
