"""Chat templates: as transformers renders them, and hostile ones told in a sentence."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import UserError
from data.tokenizers import chat
from data.tokenizers.chat import render

RECORD = json.loads((Path(__file__).parent / "smollm2.json").read_text())
HELLO = [{"role": "user", "content": "hé <b>"}]


@pytest.mark.parametrize("number", range(len(RECORD["chats"])))
def test_smollm2_as_transformers(number: int):
    record = RECORD["chats"][number]
    begins = record["add_generation_prompt"]
    got = render(record["messages"], RECORD["chat_template"], add_generation_prompt=begins)
    assert got == record["rendered"]
    other = render(record["messages"], RECORD["chat_template"], add_generation_prompt=not begins)
    assert other != got


MEANT = {
    "blocks leave no lines": ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    "json without escapes": ("{{ messages | tojson }}", '[{"role": "user", "content": "hé <b>"}]'),
    "json laid out": ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
    "specials": ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
    "loop controls": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
                      "{% endfor %}", "01"),
    "what the model says": ("{% generation %}x{% set y = 1 %}{% endgeneration %}{{ y }}", "x"),
    "tools": ("{% if tools is none %}none{% else %}{{ tools[0].name }}{% endif %}", "f"),
    "further variables": ("{{ thinks }}{{ unknown }}", "True"),
    "the year": ("{{ strftime_now('%Y') | length }}", "4"),
    "attributes by format are nothing": ("{{ '[{0.__class__}]'.format(1) }}", "[]"),
    "namespaces": ("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", "2"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_what_templates_use(case: str):
    template, want = MEANT[case]
    got = render(
        HELLO, template, bos="<s>", eos="</s>", tools=[{"name": "f"}], variables={"thinks": True}
    )
    assert got == want


HOSTILE = {
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% for i in range(9999) %}" * 4 + "{% endfor %}" * 4,
        "it takes more than 0.2 s",
    ),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "attributes by name": ("{{ messages | attr('__class__') | attr('x') }}", "SecurityError"),
    "methods that change": ("{{ messages.append(1) }}", "SecurityError"),
    "modules": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "files": ("{% include '/etc/passwd' %}", "no loader for this environment"),
    "a long text": ("{{ 'a' * 10**10 }}", "more than 512 MB of memory"),
    "a text that doubles": (
        "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}"
        "{% endfor %}{{ n.a }}",
        "more than 512 MB|takes more",
    ),
    "a wide field": ("{{ '%99999999999d' % 1 }}", "MemoryError|memory|Error"),
    "a list of lists": ("{% set x = [0] * 10**9 %}", "memory"),
    "a large power": ("{{ 9**(9**9) }}", "takes more than 0.2 s"),
    "much text": (
        "{% for i in range(9000) %}{{ 'ab' * 1000 }}{% endfor %}",
        "it wrote 18000000 letters",
    ),
    "a macro in itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "brackets": ("{{ " + "(" * 30000 + " }}", "RecursionError"),
    "blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "Error|ended with status"),
    "no syntax": ("{% for %}", "TemplateSyntaxError"),
    "an unknown filter": ("{{ 1 | launch }}", "No filter named 'launch'"),
    "a refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "a wrong sum": ("{{ 1 + 'a' }}", "TypeError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_told(case: str, monkeypatch: pytest.MonkeyPatch):
    template, sentence = HOSTILE[case]
    if "takes more" in sentence:  # the others end by themselves, late on a busy machine
        monkeypatch.setattr(chat, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^the chat template can't be rendered: .*({sentence})"):
        render(HELLO, template)
    assert time.monotonic() - began < 20  # a machine with other work; alone it is 0.3
    assert render(HELLO, "{{ messages[0].content }}") == "hé <b>"


def test_messages_must_be_json():
    with pytest.raises(UserError, match="not made of what JSON has"):
        render([{"role": object()}], "x")


def test_many_threads_share_the_process():
    got: dict[int, str] = {}

    def work(i: int) -> None:
        got[i] = render([{"role": "user", "content": str(i)}], "{{ messages[0].content }}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: str(i) for i in range(16)}


def test_a_worker_that_died_between_is_started_anew():
    render(HELLO, "x")
    process = chat._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert render(HELLO, "{{ messages | length }}") == "1"


PIECES = st.sampled_from([
    "{{ ", " }}", "{% ", " %}", "for i in range(9)", "endfor", "if x", "endif", "messages", "[0]",
    ".content", " | tojson", " ~ ", "'a'", " * ", "99999", "macro m()", "endmacro", "m()", "é",
    "set x = ", "namespace(a=1)", "(", ")", "\n", "{#", "#}", ".__class__", "{% generation %}",
])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(pieces=st.lists(PIECES, max_size=14))
def test_random_templates_render_or_are_told(pieces: list[str]):
    try:
        assert isinstance(render(HELLO, "".join(pieces)), str)
    except UserError as error:
        assert str(error).startswith("the chat template can't be rendered")  # noqa: PT017
