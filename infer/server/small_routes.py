"""Routes that generate nothing: models, tokens, health, metrics, the page."""

import asyncio
import importlib.metadata
import time
from pathlib import Path
from typing import Any

from infer.server.chat_plan import plan_chat
from infer.server.errors import ApiError, invalid
from infer.server.http_layer import Raw
from infer.server.plan import check_text
from infer.server.schemas import ChatBody
from infer.server.schemas_small import DetokenizeBody, TokenizeBody, UpdateBody
from infer.server.served_model import ServedModel, not_found
from infer.server.service import Call, Service

PAGE = Path(__file__).with_name("page.html")


async def models(service: Service, call: Call) -> Any:
    return {"object": "list", "data": [_model(service.model)]}


async def one_model(service: Service, call: Call) -> Any:
    wanted = call.path["name"]
    if wanted != service.model.name:
        raise not_found(wanted, service.model.name)
    return _model(service.model)


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "moesaic",
        "max_model_len": model.max_length,
        # As Anthropic's list of models has it.
        "type": "model",
        "display_name": model.name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.created)),
    }


async def tokenize(service: Service, call: Call) -> Any:
    """Tokens of a text; of a conversation as the model would read it."""
    body: TokenizeBody = call.body
    model = service.model
    text = body.prompt if body.content is None else body.content
    if (text is None) == (body.messages is None):
        raise invalid("give either a prompt or messages to be read", "prompt")
    if body.messages is not None:
        chat = ChatBody.model_validate({"messages": body.messages, "max_tokens": 1})
        ids = list((await plan_chat(model, chat)).text.prompt)
    else:
        asked = body.add_special if body.add_special_tokens is None else body.add_special_tokens
        # As the prompt of a completion unless it is said otherwise; llama.cpp's name means without.
        bos = None if asked is None and body.content is None else bool(asked)
        checked = check_text(text or "", "prompt")
        ids = await asyncio.to_thread(model.tokenizer.encode, checked, bos=bos)
    found = {"tokens": ids, "count": len(ids), "max_model_len": model.max_length}
    if body.return_token_strs:
        found["token_strs"] = [model.texts.text_of(i) for i in ids]
    return found


async def detokenize(service: Service, call: Call) -> Any:
    body: DetokenizeBody = call.body
    vocab_size = service.model.vocab_size
    if any(token >= vocab_size for token in body.tokens):
        raise invalid(f"tokens must lie in [0, {vocab_size})", "tokens")
    text = service.model.tokenizer.decode(body.tokens, specials=True)
    return {"prompt": text, "content": text}


async def tokenizer_info(service: Service, call: Call) -> Any:
    """What a client needs to make prompts as this model was trained on them."""
    tokenizer = service.model.tokenizer
    bos, eos = (tokenizer.text_of(i) or None for i in (tokenizer.bos_id, tokenizer.eos_id))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.add_bos,
        "vocab_size": service.model.vocab_size,
        "model_max_length": service.model.max_length,
        "chat_template": tokenizer.chat_template,
    }


async def health(service: Service, call: Call) -> Any:
    """Whether the process works: restart it if not."""
    if service.engine.failure is not None:
        raise ApiError(500, f"the engine failed: {service.engine.failure}", code="engine_failed")
    return {"status": "ok"}


async def ready(service: Service, call: Call) -> Any:
    """Whether requests are welcome."""
    await health(service, call)
    service.check_open()
    return {"status": "ready"}


async def version(service: Service, call: Call) -> Any:
    return {
        "version": importlib.metadata.version("moesaic"),
        "model": service.model.name,
        "weights_version": service.model.version,
    }


async def metrics(service: Service, call: Call) -> Any:
    return Raw(service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")


async def props(service: Service, call: Call) -> Any:
    """What llama.cpp's clients ask a server about."""
    model = service.model
    return {
        "default_generation_settings": {"n_ctx": model.max_length},
        "total_slots": service.engine.max_rows,
        "model_path": model.name,
        "model_alias": model.name,
        "n_ctx": model.max_length,
        "chat_template": model.tokenizer.chat_template or "",
        "bos_token": model.tokenizer.text_of(model.tokenizer.bos_id),
        "eos_token": model.tokenizer.text_of(model.tokenizer.eos_id),
        "can_infill": model.marks is not None,
    }


async def stats(service: Service, call: Call) -> Any:
    """What the page shows live."""
    latest = service.metrics.latest
    found = {} if latest is None else dict(vars(latest))
    if latest is not None:
        found["expert_tokens"] = [counts_E.tolist() for counts_E in latest.expert_tokens]
        found["paging"] = None if latest.paging is None else latest.paging.as_tree()
    return found | {
        "model": service.model.name,
        "max_rows": service.engine.max_rows,
        "max_length": service.model.max_length,
        "can_chat": service.model.tokenizer.chat_template is not None,
        "can_infill": service.model.marks is not None,
        "is_paused": service.engine.is_paused,
        **({} if service.offload is None else {"offload": service.offload.stats()}),
    }


async def page(service: Service, call: Call) -> Any:
    return Raw(PAGE.read_bytes(), "text/html; charset=utf-8")


async def pause(service: Service, call: Call) -> Any:
    """No step is made until /resume; requests wait."""
    _check_admin(service)
    service.engine.pause()
    return {"status": "paused"}


async def resume(service: Service, call: Call) -> Any:
    _check_admin(service)
    service.engine.resume()
    return {"status": "running"}


async def update_weights(service: Service, call: Call) -> Any:
    """Other weights of the same model, once the requests under way have ended."""
    _check_admin(service)
    assert service.update is not None
    body: UpdateBody = call.body
    make = await asyncio.to_thread(service.update, body.source)
    await service.engine.swap(make)
    service.model.version += 1
    return {"status": "updated", "weights_version": service.model.version}


def _check_admin(service: Service) -> None:
    if service.update is None:
        raise ApiError(
            403,
            "this server does not let itself be paused or updated: start it with --allow-updates",
            code="not_allowed",
        )
