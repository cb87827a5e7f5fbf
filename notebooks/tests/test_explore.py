"""The page of explore.py in a real browser: it keeps what the policies keep, and shows text as text."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

import explore
from generate import encode
from gvote import GVote, PeakVotes
from model import KVCache, Llama
from tasks import record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
missing = "no Chromium here (Debian: apt-get install chromium)"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=missing)
websocket = pytest.importorskip("websocket", reason="websocket-client, which comes with Jupyter, is missing")

FLAGS = """--headless --no-sandbox --remote-debugging-port=0 --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""
MARKUP = 'Tom & Ann hid 7 keys.\n</script><img src=x onerror="console.error(1)"><!-- DATA &amp; 🔑 鍵\n'
SETTINGS = [
    *({"rule": "per_sample", "top_p": p, "n_samples": n} for p, n in ((0.95, 8), (0.6, 1), (0.99, 16))),
    *({"rule": "current_query", "top_p": p, "n_samples": n} for p, n in ((0.95, 8), (0.8, 3), (1, 2))),
    *({"rule": "peak_votes", "bar": bar} for bar in (0.02, 0.003, 0.2)),
]


class Browser:
    """Headless Chromium with a page open, driven by the DevTools protocol."""

    def __init__(self, page: Path, profile: Path):
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        port = profile / "DevToolsActivePort"
        self.wait(lambda: port.exists() and "\n" in port.read_text())
        with urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            url = next(x["webSocketDebuggerUrl"] for x in json.load(answer) if x["type"] == "page")
        self.socket, self.n_sent, self.events = websocket.create_connection(url, suppress_origin=True), 0, []
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=page.as_uri())
        self.wait(lambda: self.run("document.querySelectorAll('#intro:not(:has(noscript))').length"))

    def wait(self, ready, seconds: float = 20):
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, "the browser does not get ready"
            time.sleep(0.05)

    def send(self, method: str, **params) -> dict:
        self.n_sent += 1
        self.socket.send(json.dumps({"id": self.n_sent, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.n_sent:
            self.events.append(message)
        return message["result"]

    def run(self, script: str):
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def choose(self, rule: str, **sliders):
        """As a reader does: presses the rule's button, moves the sliders."""
        self.run(f"document.querySelector('input[value={rule}]').click()")
        for name, value in sliders.items():
            slider = f"document.getElementById('{name}')"
            self.run(f"{slider}.value = {value}; {slider}.dispatchEvent(new Event('input'))")

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def seen(self, element: str) -> bool:
        """Is all of an element on the screen?"""
        box = f"document.querySelector('{element}').getBoundingClientRect()"
        return self.run(f"(b => b.top >= 0 && b.bottom <= innerHeight && b.height > 0)({box})")

    def resize(self, width: int, height: int):
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=width < 500)


def policy(rule: str, **settings):
    return PeakVotes(**settings) if rule == "peak_votes" else GVote(**settings, budget=rule)


def check_page(browser: Browser, model: Llama, ids: torch.Tensor, settings_to_try: list, n_different: int):
    """The page's masks and figures against those of the policies, which read the prompt here and now."""
    layers = record(model, ids)
    for settings in settings_to_try:
        browser.choose(**settings)
        masks = torch.cat([policy(**settings)(*layer) for layer in layers])  # (layers, H_kv, T)
        rows = browser.run("kept.map(mask => mask.join('')).join(' ')").split()
        shown = torch.tensor([[bit == "1" for bit in row] for row in rows]).view_as(masks)
        assert (shown != masks).sum() <= n_different, settings
        if settings["rule"] != "peak_votes":
            heads, union = "data.looked_at", "voters(head, i).flat().some(([, vote]) => vote)"
            agree = f"{heads}.every(head => kept[head].every((keep, i) => keep == {union}))"
            assert browser.run(agree), settings
        cache = KVCache(model.config, max_new_tokens=explore.NEW_TOKENS)
        for (attn, _, keys, values), mask in zip(layers, shown, strict=True):
            cache.fill(attn.layer, keys, values, mask[None])
        cache.advance(ids.size(1))
        total, size = (browser.run(f"document.getElementById('{x}').textContent") for x in ("total", "size"))
        assert f" {cache.usage:.0%} " in total and f" {cache.nbytes / 2**20:.1f} MiB " in size, settings


def check_silence(browser: Browser, page: Path):
    """Nothing was asked of any other place, nothing was logged, nothing failed."""
    requests = [x["params"] for x in browser.events if x["method"] == "Network.requestWillBeSent"]
    assert [x["request"]["url"] for x in requests] == [page.as_uri()]
    loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert not [x for x in browser.events if x["method"] in loud]


def test_committed_page(llama, tokenizer, tmp_path):
    page = Path(explore.__file__).with_name("explore.html")
    assert page.stat().st_size < 1.5e6
    browser = Browser(page, tmp_path)
    try:
        ids = encode(tokenizer, browser.run("data.words.join('')"), chat=False)
        # of 103,680 keys: another CPU may round differently
        check_page(browser, llama, ids, SETTINGS[::3], n_different=10)
        check_silence(browser, page)
    finally:
        browser.close()


def test_first_look_at_the_committed_page(tmp_path):
    browser = Browser(Path(explore.__file__).with_name("explore.html"), tmp_path)
    try:
        assert browser.run("voters(state.head, state.token).flat().some(([, vote]) => vote)")
        browser.resize(1280, 800)
        for element in ("#text", "#top_p", "#n_samples", "#cells", ".chosen"):
            assert browser.seen(element), element
        browser.resize(390, 844)
        browser.run("document.getElementById('text').scrollIntoView()")
        for element in ("#text", "#top_p", "#n_samples", "#total"):
            assert browser.seen(element), element
        bottom, top = (f"document.querySelector('{x}').getBoundingClientRect()" for x in ("#text", "#dock"))
        assert browser.run(f"{bottom}.bottom <= {top}.top")
        here = browser.run("spans[state.token].offsetTop")
        browser.run("document.getElementById('text').focus()")
        for key, below in (("ArrowDown", True), ("ArrowUp", False)):
            browser.send("Input.dispatchKeyEvent", type="keyDown", key=key)
            assert (browser.run("spans[state.token].offsetTop") > here) == below
        assert browser.run("spans[state.token].offsetTop") == here
        browser.run("cells.at(-1).scrollIntoView(); cells.at(-1).click()")
        assert browser.seen("#scopes") and browser.seen("#text")
        browser.run("window.scrollTo(0, 0); spans[state.token + 1].click()")
        assert browser.seen(".chosen")
        assert browser.run(f"document.querySelector('#details').getBoundingClientRect().bottom <= {top}.top")
        command = "For the answer with these settings, run python generate.py --policy gvote:0.9"
        for top_p, text in ((0.9, command), (1, "With all keys the model answers")):
            browser.choose("per_sample", top_p=top_p)
            assert text in browser.run("document.getElementById('result').textContent")
    finally:
        browser.close()


def test_page_that_cannot_be_unpacked_says_so(tmp_path):
    text = Path(explore.__file__).with_name("explore.html").read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(text.replace('"arrays": "', '"arrays": "AAAA'), encoding="utf-8")
    browser = Browser(page, tmp_path / "profile")
    try:
        assert "could not unpack" in browser.run("document.getElementById('intro').textContent")
        assert not browser.run("document.getElementById('text').checkVisibility()")
        check_silence(browser, page)
    finally:
        browser.close()


def test_page_of_a_text_with_markup(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "NEW_TOKENS", 4)
    page = tmp_path / "page.html"
    page.write_text(explore.make_page(llama, tokenizer, MARKUP, stop=[]), encoding="utf-8")
    browser = Browser(page, tmp_path / "profile")
    try:
        ids = encode(tokenizer, MARKUP)
        # the page has all samples in one product: fewer may round differently
        check_page(browser, llama, ids, SETTINGS, n_different=2)
        shown = browser.run("document.getElementById('text').textContent").replace("↵", "")
        assert shown == tokenizer.decode(ids[0]) and MARKUP.strip() in shown
        assert browser.run("document.images.length") == 0
        check_silence(browser, page)
    finally:
        browser.close()
