"""The page in a real browser: it needs chromium and chromedriver, which CI installs."""

import pytest

from tests.infer.server.browser import BROWSER, DRIVER, browser
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DRIVER is None or BROWSER is None, reason="there is no chromium with chromedriver here"
    ),
]
SAID = "Code:\n```python\ndef f(x):\n    return x\n```\n<b>no markup</b> Grüße 한국어."
ENTER, ESCAPE, CONTROL = "\ue007", "\ue00c", "\ue009"


@pytest.fixture(scope="module")
def server():
    tokenizer = byte_tokenizer()

    def reply(request):
        text = tokenizer.decode(request.prompt)
        return [70] * 900 if "for ever" in text else tokenizer.encode(SAID)

    with served(ScriptedEngine(tokenizer, reply, step_seconds=0.002), tokenizer) as made:
        yield made


@pytest.fixture
def window(server):
    with browser() as made:
        made.open(f"{server.url}/")
        made.wait_for("document.getElementById('name').textContent === 'tiny'")
        yield made


LAST = "[...document.querySelectorAll('.message.assistant')].at(-1)"


def test_a_conversation_by_keyboard_that_outlives_a_reload(window):
    window.type_into("#input", f"Hello{ENTER}")
    window.wait_for(f"{LAST}?.querySelector('.cost').textContent.includes('tokens/s')")
    said = window.run(f"return {LAST}.querySelector('.said').textContent")
    assert said == SAID.replace("```python\n", "").replace("```\n", "").replace("x\n<", "x<")
    assert (
        window.run(f"return {LAST}.querySelector('pre').textContent") == "def f(x):\n    return x"
    )
    assert window.run(f"return {LAST}.querySelector('b')") is None
    assert "from the cache" in window.run(f"return {LAST}.querySelector('.cost').textContent")
    window.ask("POST", "refresh", {})
    window.wait_for(f"{LAST}?.textContent.includes('Grüße 한국어')")
    window.type_into("#input", f"for ever{ENTER}")
    window.wait_for(f"{LAST}.querySelector('.said').textContent.length > 3")
    window.type_into("#input", ESCAPE)
    window.wait_for(f"{LAST}.querySelector('.cost').textContent.includes('stopped')")
    window.run("document.getElementById('new').click()")
    assert window.run("return document.querySelectorAll('#sessions li').length") == 2
    assert not window.ask("POST", "se/log", {"type": "browser"})


def test_completion_at_the_cursor(window):
    window.run("document.getElementById('tab-complete').click()")
    window.type_into("#code", f"x = 1{CONTROL}{ENTER}")
    window.wait_for("document.getElementById('code-cost').textContent.includes('made')")
    assert window.run("return document.getElementById('code').value") == f"x = 1{SAID}"


def test_the_load_of_experts_is_live(window):
    """A row of bars for each layer, the busiest one highest; of what came since the last look."""
    window.run("document.getElementById('load').open = true")
    window.wait_for("document.querySelectorAll('#layers .layer').length === 2")
    window.type_into("#input", f"Hello{ENTER}")
    bars = "[...x.children].map(i => i.style.height)"
    heights = f"[...document.querySelectorAll('.layer')].map(x => {bars})"
    window.wait_for(f"({heights})[0].join() === '100%,0%,0%'")
    assert window.run(f"return {heights}")[1] == ["0%", "0%", "100%"]
    title = window.run("return document.querySelector('.layer').title")
    assert title == "MoE layer 1: the busiest expert has 3.0 times the mean"


def test_errors_are_shown(window):
    window.run("document.getElementById('temperature').value = 9")
    window.type_into("#input", f"Hello{ENTER}")
    window.wait_for(f"{LAST}?.querySelector('.cost.error')?.textContent.includes('temperature')")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(server, width):
    with browser(width, 700) as window:
        window.open(f"{server.url}/")
        window.wait_for("document.getElementById('name').textContent === 'tiny'")
        window.type_into("#input", f"Hello{ENTER}")
        window.wait_for(f"{LAST}?.querySelector('.cost').textContent.includes('made')")
        assert window.run(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
