"""Continuous batching beside static batching and llama.cpp, under the same load."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving import load, measured, servers
from benchmarks.serving.load import Ask
from benchmarks.serving.measured import Measured
from benchmarks.serving.request import Findings, Request, ours, some_text
from benchmarks.serving.servers import Command, Server
from configs.checks import require
from infer.sources import open_source
from train.progress import ProgressBar


def load_part(request: Request) -> Findings:
    """All of them in alternating rounds, and a table of what they came to."""
    source = open_source(request.source)
    length = min(request.length, source.config.context_length)
    lengths = load.draw_lengths(
        request.requests,
        request.seed,
        prompt_mean=request.prompt_mean,
        answer_mean=request.answer_mean,
        longest=length - 8,  # a piece of text is not always as many tokens as it was
    )
    asks = load.make_asks(source.tokenizer(), some_text(), lengths, request.seed)
    sizes = ("--max-length", str(length), "--max-rows", str(request.rows), *ours(request))
    sizes += ("--max-queue", str(request.requests))
    commands = [
        servers.our_command("continuous", source, sizes),
        servers.our_command("static", source, (*sizes, "--batching", "static")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        peer, reason = servers.llama_command(
            source, Path(folder), request.weights, rows=request.rows, length=length
        )
        left_out = {} if peer is not None else {servers.LLAMA: reason}
        commands += [] if peer is None else [peer]
        found, failed = alternate(commands, asks, request)
    left_out |= failed
    kind = f"{request.clients} clients" if request.rate is None else f"{request.rate:g} requests/s"
    measured.print_turns(found, f"{kind}, {request.rounds} rounds of {request.requests}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    tokens = {"prompt": sum(p for p, _ in lengths), "answer": sum(a for _, a in lengths)}
    return {"turns": measured.as_json(found), "tokens": tokens, "left_out": left_out}, found


def alternate(
    commands: Sequence[Command], asks: Sequence[Ask], request: Request
) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    """Turns of each server in alternating rounds, after one that does not count; and why others
    did not start."""
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running: list[Server] = []
        for command in commands:
            try:
                running.append(stack.enter_context(servers.started(command)))
            except servers.ServerFailure as error:
                left_out[command.name] = str(error)
        require(bool(running), f"no server started: {'; '.join(left_out.values())}")
        turns: dict[str, list[Measured]] = {server.name: [] for server in running}
        total = len(running) * (request.rounds + 1)
        with ProgressBar("serving", total=total, unit="turns") as bar:
            for turn in range(request.rounds + 1):
                for i, server in enumerate(running):
                    some = asks if turn else asks[: 2 * request.rows]
                    made = turn_of(server, some, request)
                    if turn:
                        turns[server.name].append(made)
                    bar.update(turn * len(running) + i + 1)
        return turns, left_out


def turn_of(server: Server, asks: Sequence[Ask], request: Request) -> Measured:
    """One turn; no prompt's beginning is found in a cache, which other parts measure."""
    extra = dict(server.extra)
    if not server.name.startswith(servers.LLAMA):
        extra["cache_salt"] = os.urandom(8).hex()
    answers, seconds = load.run_load(server.url, asks, request.traffic, request.seed, extra)
    return measured.measure(answers, seconds)
