"""The model that scripts.serve serves, and the server around it."""

import argparse
import asyncio
import dataclasses
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from checkpoint.run_directory import read_run
from configs.checks import require
from evals.expert_domains import read_preference
from infer.engine import Engine, EngineOptions
from infer.engine.checks import unroutable_reason
from infer.engine.programs import Programs, WholeModel
from infer.model_draft import ModelDraft, check_model_draft
from infer.mtp_draft import MtpDraft, check_mtp_draft
from infer.ngram_draft import NgramDraft
from infer.server.app import make_app
from infer.server.embeddings import Embedder
from infer.server.engine_thread import EngineThread
from infer.server.keys import ApiKeys, read_keys
from infer.server.metrics import Metrics
from infer.server.process import LOG, ListenOptions, address_of, bind, log_to, serve
from infer.server.served_model import ServedModel
from infer.server.service import Limits, Service
from infer.sources import Source, open_source
from infer.weights import check_format
from model.model_state import unpageable_reason
from model.step import Preference
from model.transformer import Transformer
from model.unstacked import unstack_preference
from scripts.model_options import AXES, LENGTH, kept_weights, load_model
from scripts.offloading import check_offload_options, open_offload
from scripts.paged import asked_programs
from train.progress import ProgressBar


def run(source: Source, arguments: argparse.Namespace, mesh: Mesh | None) -> None:
    """Loads the model and serves it until a signal comes."""
    options = engine_options(source, arguments)
    check_offload_options(arguments)
    keys = read_keys(Path(arguments.api_key_file)) if arguments.api_key_file else ApiKeys([])
    listen = ListenOptions(arguments.host, arguments.port, arguments.drain_seconds)
    listening = bind(listen)  # before minutes of loading
    began = time.perf_counter()
    service = make_service(source, arguments, options, mesh)
    seconds = {"weights": time.perf_counter() - began}
    address = address_of(listening, arguments.host)
    if not keys and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print("note: whoever reaches this address may ask: --api-key-file says who may", flush=True)
    log_to()
    app = make_app(service, keys)

    def prepare() -> None:
        began = time.perf_counter()
        warm_up_all(service)
        seconds["programs"] = time.perf_counter() - began

    def on_ready() -> None:
        print(greeting(service.model, address, has_keys=bool(keys)), flush=True)
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        LOG.info(json.dumps({"event": "started", "seconds": rounded}))

    serving = serve(
        service,
        app,
        listening,
        listen,
        prepare,
        on_ready,
    )
    asyncio.run(serving)
    # In a compilation, which would crash on the way out.
    if any(engine.is_running for engine in service.engines):
        sys.stdout.flush()
        os._exit(0)


def engine_options(source: Source, arguments: argparse.Namespace) -> EngineOptions:
    """
    Raises:
      UserError: bounds that the model can't follow.
    """
    longest = source.config.context_length
    length = min(LENGTH, longest) if arguments.max_length is None else arguments.max_length
    require(
        2 <= length <= longest,
        f"--max-length {length} must lie between 2 and the model's context_length={longest}",
    )
    require(arguments.max_queue >= 0, f"--max-queue {arguments.max_queue} must not be negative")
    size = arguments.max_body_bytes
    require(size > 0, f"--max-body-bytes {size} must be greater than 0")
    mib = arguments.host_cache_mib
    require(mib >= 0, f"--host-cache-mib {mib} must not be negative")
    require(0 <= arguments.port < 65536, f"--port {arguments.port} must lie between 0 and 65535")
    options = EngineOptions(
        max_rows=arguments.max_rows,
        max_length=length,
        batching=arguments.batching,
        kv_dtype=arguments.kv,
        num_pages=arguments.kv_pages,
        prefix_cache=not arguments.no_prefix_cache,
        host_cache_bytes=arguments.host_cache_mib << 20,
        target_seconds=arguments.step_seconds,
        draft=draft_of(source, arguments),
        keeps_experts=unroutable_reason(source.config) is None,
        cache_dir=arguments.cache_dir and os.path.expanduser(arguments.cache_dir),
    )
    if options.num_pages is None and unpageable_reason(source.config) is None:
        num_pages = 1 + options.max_rows * -(-length // options.page_size)
        options = dataclasses.replace(options, num_pages=num_pages)
    return options


def draft_of(
    source: Source, arguments: argparse.Namespace
) -> NgramDraft | MtpDraft | ModelDraft | None:
    """
    Raises:
      UserError: a length without a draft, a draft that the model can't have, or no such source.
    """
    kind, length = arguments.draft, arguments.draft_length
    if kind is None:
        require(length is None, f"--draft-length {length} has no effect without --draft: give both")
        return None
    require(length is None or length >= 1, f"--draft-length {length} must be at least 1")
    given = {} if length is None else {"length": length}
    if kind == "ngram":
        return NgramDraft(**given)
    if kind == "mtp":
        check_mtp_draft(source.config)
        return MtpDraft(**given)
    sizes = [getattr(arguments, f"mesh.{axis}") for axis in AXES]
    require(
        set(sizes) == {1},
        f"--draft {kind} runs on one device, and the mesh has more: leave --mesh out, or draft "
        "with ngram or mtp",
    )
    other = open_source(kind)
    draft = ModelDraft(Transformer(other.config), {}, **given)
    check_model_draft(source.config, draft)  # before it is read
    weights, kept = check_format(arguments.weights), kept_weights()
    model, variables = other.load(for_decoding=True, weights=weights, kept=kept)
    return dataclasses.replace(draft, model=model, variables=variables)


def make_service(
    source: Source, arguments: argparse.Namespace, options: EngineOptions, mesh: Mesh | None
) -> Service:
    """The service of a model that is read now."""
    tokenizer = source.tokenizer()
    programs = asked_programs(source, arguments)
    if programs is None:
        programs = WholeModel(*load_model(source, arguments, mesh, for_decoding=True))
    default = source.path.stem if source.kind == "gguf" and source.name != "smollm2" else None
    names = arguments.served_name or [default or Path(source.name).name or source.name]
    served = ServedModel(
        names[0],
        tokenizer,
        programs.model.config.vocab_size,
        options.max_length,
        preference_finder(source),
        aliases=tuple(names[1:]),
    )
    metrics = Metrics(served.name)
    engine = engine_of(programs, options, mesh)
    thread = EngineThread(engine, options.max_rows, arguments.max_queue, metrics.step)
    limits = Limits(max_body_bytes=arguments.max_body_bytes)
    service = Service(served, thread, metrics, limits, embed=Embedder(programs, mesh))

    def update(name: str) -> Callable[[Engine], Engine]:
        other = open_source(name)
        require(
            other.config == source.config,
            f"{name} is another architecture than {source.name}: start a server for it",
        )
        loaded = load_model(other, arguments, mesh, for_decoding=True, is_kept=False)
        new = WholeModel(*loaded)

        def make(engine: Engine) -> Engine:
            made = engine_of(new, options, mesh)
            made.warm_up()  # compiled already
            service.embed = Embedder(new, mesh)
            return made

        return make

    service.update = update if arguments.allow_updates else None
    service.offload = open_offload(source, arguments, options)
    return service


def engine_of(programs: Programs, options: EngineOptions, mesh: Mesh | None) -> Engine:
    return Engine(programs.model, programs.variables, options, mesh=mesh, programs=programs)


def preference_finder(source: Source) -> Callable[[Sequence[str]], Preference]:
    """Finds the experts that domains ask for, together."""

    @functools.lru_cache(maxsize=64)
    def find(names: tuple[str, ...]) -> Preference:
        require(
            source.kind == "run", f"expert_preference needs a trained run, {source.name} is none"
        )
        found = [read_preference(source.path, name) for name in names]
        total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *found)
        return unstack_preference(Transformer(read_run(source.path).model), total)

    return lambda names: find(tuple(names))


def warm_up_all(service: Service) -> None:
    """Compiles what the engines, and a look at a question, can meet."""
    for thread in service.engines:
        warm_up(thread.engine)
    if service.offload is not None:
        service.offload.features([0, 0])


def warm_up(engine: Engine) -> None:
    """Compiles what the engine can meet, with a bar."""
    bar: ProgressBar | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = ProgressBar("compiling", total=total, unit="programs")
            bar.__enter__()
        bar.update(done)

    try:
        engine.warm_up(progress)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def greeting(model: ServedModel, address: str, *, has_keys: bool) -> str:
    """What is printed once requests are welcome: where, and how to ask."""
    chats = model.tokenizer.chat_template is not None
    path = "chat/completions" if chats else "completions"
    asked = '"messages": [{"role": "user", "content": "Hello"}]' if chats else '"prompt": "import "'
    key = " -H 'authorization: Bearer KEY'" if has_keys else ""
    name = shlex.quote(model.name)
    body = f'{{"model": "{model.name}", {asked}, "max_tokens": 64}}'
    ask = (
        'chat.completions.create(model="{}", messages=[{{"role": "user", "content": "Hello"}}])'
        if chats
        else 'completions.create(model="{}", prompt="import ")'
    ).format(model.name)
    return (
        f"\n{name} is served at {address}, with a page to talk to\n\n"
        f"  curl {address}/v1/{path}{key} -H 'content-type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        f"  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{address}/v1", api_key="{"KEY" if has_keys else "none"}")\n'
        f"  client.{ask}\n\n"
        "Ctrl-C stops it once the requests under way are answered."
    )
