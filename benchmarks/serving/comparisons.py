"""Ours with and without: a prefix from the cache, drafts, and what an earlier start has left."""

import contextlib
import itertools
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving import load, measured, servers
from benchmarks.serving.load import Ask, Traffic
from benchmarks.serving.measured import Measured
from benchmarks.serving.request import Findings, Request, ours, sized, some_text
from benchmarks.serving.servers import Server
from configs.checks import require
from infer.sources import Source, open_source
from train.progress import ProgressBar

SHARE = 0.99
"""Of a prompt's tokens, that others have had."""
SOME_TOKENS = 16
"""Of an answer whose first token counts."""
ONE = Traffic(clients=1)


def prefix_part(request: Request) -> Findings:
    """Until the first token of a long prompt: read, with 99% of it in memory, with as much in a
    folder alone."""
    source = open_source(request.source)
    tokens = sized(source, request.shared)
    asks = shared_asks(source, tokens, request.rounds + 1, request.seed)
    sizes = ("--max-length", str(tokens + 24), "--max-rows", "1", *ours(request))
    turns: dict[str, list[Measured]] = {"read": [], "memory": [], "disk": []}
    cached = dict.fromkeys(turns, 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        disk = servers.our_command("disk", source, (*sizes, "--cache-dir", folder))
        with servers.started(disk) as server:
            first_token(server, asks[0])
        read = servers.our_command("read", source, (*sizes, "--no-prefix-cache"))
        none = stack.enter_context(servers.started(read))
        memory = stack.enter_context(servers.started(servers.our_command("memory", source, sizes)))
        first_token(none, asks[0])
        first_token(memory, asks[0])
        for ask in asks[1:]:
            with servers.started(disk) as anew:  # nothing of it is in its memory
                for name, server in (("read", none), ("memory", memory), ("disk", anew)):
                    made, hits = first_token(server, ask)
                    turns[name].append(made)
                    cached[name] = hits
    measured.print_turns(turns, f"{tokens:,} tokens, {SHARE:.0%} shared")
    for name in ("memory", "disk"):
        sooner = measured.ratios(turns["read"], turns[name], "first_token_p50")
        print(f"first token from {name}: {statistics.median(sooner):.1f} times sooner")
    kept = {"turns": measured.as_json(turns), "tokens": tokens, "cached_tokens": cached}
    return kept, turns


def shared_asks(source: Source, tokens: int, count: int, seed: int) -> list[Ask]:
    """Prompts of which the first 99% are the same."""
    tokenizer = source.tokenizer()
    ids = tokenizer.encode(some_text(), bos=False)
    shared, own = int(tokens * SHARE), tokens - int(tokens * SHARE)
    require(
        len(ids) > tokens + count * own,
        f"--shared {tokens} is more than the {len(ids):,} tokens of text that there are",
    )
    asks = []
    for i in range(count):
        begin = tokens + (seed + i) * own % (len(ids) - tokens - own)
        end = ids[begin : begin + own]
        asks.append(Ask(tokenizer.decode([*ids[:shared], *end]), SOME_TOKENS))
    return asks


def first_token(server: Server, ask: Ask) -> tuple[Measured, int]:
    """One request, and the tokens of it that came from the cache."""
    answers, seconds = load.run_load(server.url, [ask], ONE, 0, server.extra)
    require(answers[0].error is None, f"{server.name} does not answer: {answers[0].error}")
    return measured.measure(answers, seconds), answers[0].cached_tokens


def drafts_part(request: Request) -> Findings:
    """Code that is written again with a name changed, and text that does not repeat: with drafts
    and without."""
    source = open_source(request.source)
    length = min(request.length, source.config.context_length)
    asks = {
        "edits": edit_asks(source, request, length),
        "drawn": drawn_asks(source, request, length),
    }
    kinds = ["off", "ngram", *(["mtp"] if source.config.multi_token is not None else [])]
    sizes = ("--max-length", str(length), "--max-rows", str(request.rows), *ours(request))
    turns: dict[str, list[Measured]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for kind in kinds:
            options = sizes if kind == "off" else (*sizes, "--draft", kind)
            command = servers.our_command(kind, source, options)
            running[kind] = stack.enter_context(servers.started(command))
        places = itertools.product(range(request.rounds + 1), asks.items(), running.items())
        total = (request.rounds + 1) * len(asks) * len(running)
        with ProgressBar("drafts", total=total, unit="turns") as bar:
            for done, (turn, (work, some), (kind, server)) in enumerate(places):
                bar.update(done)
                some = some if turn else some[: request.rows]
                extra = server.extra | {"cache_salt": os.urandom(8).hex()}
                extra |= {"temperature": 1.0, "seed": turn} if work == "drawn" else {}
                traffic = Traffic(clients=min(request.clients, len(some)))
                made = measured.measure(*load.run_load(server.url, some, traffic, 0, extra))
                if turn:
                    turns.setdefault(f"{work}, {kind}", []).append(made)
            bar.update(total)
    for work in asks:
        own = {name: x for name, x in turns.items() if name.startswith(f"{work},")}
        measured.print_turns(own, f"{request.rounds} rounds")
    return {"turns": measured.as_json(turns)}, turns


def edit_asks(source: Source, request: Request, length: int) -> list[Ask]:
    """Code, then its beginning again: the rest is to be copied with a name changed."""
    tokenizer, text = source.tokenizer(), some_text()
    room = (length - 8) // 3
    lengths = [(room, room)] * min(request.requests, 16)
    asks = []
    for ask in load.make_asks(tokenizer, text, lengths, request.seed):
        begun = ask.prompt[: len(ask.prompt) // 8].replace("self", "this")
        prompt = f"{ask.prompt}\n# The same with self renamed to this:\n{begun}"
        ids = tokenizer.encode(prompt)[: length - room - 1]
        asks.append(Ask(tokenizer.decode(ids), room))
    return asks


def drawn_asks(source: Source, request: Request, length: int) -> list[Ask]:
    """Short prompts, whose answers are drawn at temperature 1."""
    lengths = [(length // 8, length // 3)] * min(request.requests, 16)
    return load.make_asks(source.tokenizer(), some_text(), lengths, request.seed + 7)


def start_part(request: Request) -> Findings:
    """From nothing to the first token: with what an earlier start has left, and without."""
    source = open_source(request.source)
    tokens = sized(source, min(request.shared, request.length))
    (ask,) = shared_asks(source, tokens, 1, request.seed)
    sizes = ("--max-length", str(tokens + 24), "--max-rows", str(request.rows), *ours(request))
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    turns: dict[str, list[Measured]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as kept:
        start(source, sizes, kept, ask)  # leaves programs and the prompt's state
        with ProgressBar("starts", total=2 * request.rounds, unit="starts") as bar:
            for turn in range(request.rounds):
                with tempfile.TemporaryDirectory() as empty:
                    for i, (name, folder) in enumerate((("cold", empty), ("warm", kept))):
                        items, made = start(source, sizes, folder, ask)
                        found[name].append(items)
                        turns[name].append(made)
                        bar.update(2 * turn + i + 1)
    print_starts(found, tokens)
    return {"starts": found, "tokens": tokens, "turns": measured.as_json(turns)}, turns


def start(
    source: Source, sizes: Sequence[str], folder: str, ask: Ask
) -> tuple[dict[str, float], Measured]:
    """The seconds of each part of a start whose caches lie in this folder, and its first answer."""
    options = (*sizes, "--cache-dir", f"{folder}/prefixes")
    places = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": f"{folder}/moesaic/xla"}
    command = servers.our_command("start", source, options, **places)
    with servers.started(command) as server:
        made, _ = first_token(server, ask)
    weights, programs = (server.started.get(name, 0.0) for name in ("weights", "programs"))
    items = {
        "Python and imports": server.start_seconds - weights - programs,
        "weights": weights,
        "programs": programs,
        "first token": made.first_token_p50,
    }
    return items | {"in all": sum(items.values())}, made


def print_starts(found: Mapping[str, Sequence[Mapping[str, float]]], tokens: int) -> None:
    title = f"seconds, a prompt of {tokens:,} tokens"
    table = Table("", *found, "sooner", title=title, title_justify="left")
    for item in next(iter(found.values()))[0]:
        middles: list[Any] = [statistics.median(x[item] for x in turns) for turns in found.values()]
        table.add_row(item, *(f"{m:.2f}" for m in middles), f"{middles[0] / middles[1]:.1f}x")
    Console().print(table)
