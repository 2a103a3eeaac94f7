"""The metadata that gives llama.cpp a tokenizer: the way back of gguf_tokenizer.py."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from configs.checks import UserError
from data.tokenizers.gguf_ends import END_OF_MESSAGE, end_ids
from data.tokenizers.gguf_tokenizer import (
    BYTE,
    CONTROL,
    CUTS,
    GEMMA4,
    LINES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
    tokenizer_from_gguf,
)
from data.tokenizers.public_tokenizer import PublicTokenizer

PROBE = (
    "I'LL we'll don't  3 33 3333 x=12345;\n\n\t  foo(bar)\r\n HTTPServer camelCase's über naïve "
    "日本語テキスト 한국어 العربية हिन्दी ½² //path/to\n... !important café\u3000ab <0x0A> ▁   "
)
"""A text on which the cuts differ, and tokenizers that only look alike."""


def tokenizer_to_gguf(tokenizer: PublicTokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata for a model of that many tokens, from which the same tokenizer can be made.

    Raises:
      UserError: a tokenizer that llama.cpp has no kind for.
    """
    state = json.loads(tokenizer.tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer is of the kind {model['type']}, expected BPE")
    tokens, types = _tokens(state, vocab_size)
    values: dict[str, Any] = {"tokens": tokens, "token_type": types}
    values |= (
        _pieces(model, state, tokens, types)
        if model.get("byte_fallback")
        else _bytes(tokenizer, model)
    )
    values |= _specials(tokenizer, tokens)
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    _check_same(tokenizer, tokenizer_from_gguf(metadata, "the metadata"))
    return metadata


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """By id, and their types; ids that the model has and the tokenizer lacks are unused."""
    vocab = dict(state["model"]["vocab"]) | {t["content"]: t["id"] for t in state["added_tokens"]}
    if max(vocab.values(), default=0) >= vocab_size:
        raise UserError(
            f"the tokenizer has token {max(vocab.values())}, the model vocab_size={vocab_size}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
    for added in state["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _bytes(tokenizer: PublicTokenizer, model: dict[str, Any]) -> dict[str, Any]:
    pre = _cut(tokenizer.tokenizer, bool(model.get("ignore_merges")))
    return {"model": "gpt2", "pre": pre, "merges": _merges(model), "add_space_prefix": False}


def _merges(model: dict[str, Any]) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def _cut(tokenizer: Tokenizer, ignores_merges: bool) -> str:
    """The name of the cut that does on the probe what the tokenizer does."""
    normalizer: Any = tokenizer.normalizer
    cutter: Any = tokenizer.pre_tokenizer
    is_composed = normalizer is not None and normalizer.normalize_str("e\u0301") == "é"
    pieces = cutter.pre_tokenize_str(PROBE) if cutter is not None else None
    for name, cut in CUTS.items():
        is_like = (cut.is_composed, cut.ignores_merges) == (is_composed, ignores_merges)
        if is_like and pre_tokenizer(cut).pre_tokenize_str(PROBE) == pieces:
            return name
    raise UserError(
        f"llama.cpp has no name for how this tokenizer cuts text: those known are {', '.join(CUTS)}"
    )


def _pieces(
    model: dict[str, Any], state: dict[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Scores that put the tokens in the order of the merges that make them; the merges themselves
    where none reaches over the end of a line.
    """
    kinds = {f"<0x{i:02X}>": BYTE for i in range(256)} | {model["unk_token"]: UNKNOWN}
    types = [kinds.get(token, kind) for token, kind in zip(tokens, types, strict=True)]
    if state["pre_tokenizer"] == LINES:
        return {"model": GEMMA4, "merges": _merges(model), "token_type": types}
    scores = dict.fromkeys(tokens, -1e9)
    for rank, merge in enumerate(model["merges"]):
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if scores.get(token) == -1e9:
            scores[token] = -float(rank)
    values = {"model": "llama", "scores": list(scores.values()), "token_type": types}
    return values | {"add_space_prefix": _space_prefix(state) != "never"}


def _space_prefix(state: dict[str, Any]) -> str:
    """Scheme of the space before a text: "prepend" (a normalizer: before every piece between
    special tokens), Metaspace's "first" (before the whole, unless it begins with one) and
    "always" (before every piece that begins with none), or "never".
    """
    if "Prepend" in json.dumps(state["normalizer"]):
        return "prepend"
    cutter = state["pre_tokenizer"] or {}
    for part in cutter.get("pretokenizers", [cutter]):
        if part.get("type") == "Metaspace":
            return part["prepend_scheme"]
    return "never"


def told_difference(tokenizer: PublicTokenizer) -> str | None:
    """A sentence on what llama.cpp does otherwise with a tokenizer that `tokenizer_to_gguf` takes;
    None where nothing is.
    """
    if _space_prefix(json.loads(tokenizer.tokenizer.to_str())) not in ("first", "always"):
        return None
    return (
        "llama.cpp puts a space before every text and after every special token; this tokenizer "
        "does not where one stands already, or a special token: texts that begin with a space, and "
        "chats, get other tokens there"
    )


def _specials(tokenizer: PublicTokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """Ids of bos, eos, end of turn and end of message. llama.cpp finds further ends by how they are
    spelt, so only those that it would not find need a name; but an eos that it is not told is token
    11 to it, or 2.
    """
    eos_id = tokenizer.eos_id
    if eos_id is None:
        eos_id = min(tokenizer.eos_ids, default=None)
    others = tokenizer.eos_ids - {eos_id}
    found = sorted(others & end_ids(tokens, {}))
    hidden = sorted(others.difference(found))
    if len(hidden) > 2:
        raise UserError(
            f"the tokenizer has {len(tokenizer.eos_ids)} tokens that end an answer, and GGUF has "
            f"no name for {', '.join(repr(tokens[i]) for i in hidden[2:])}"
        )
    messages = [i for i in found if tokens[i] == END_OF_MESSAGE]
    turns = [i for i in found if i not in messages]
    ids = {"bos": tokenizer.bos_id, "eos": eos_id}
    ids |= dict(zip(("eot", "eom"), [*(hidden or turns[:1] or [None]), *messages], strict=False))
    values: dict[str, Any] = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return values | {"add_bos_token": tokenizer.add_bos}


def _check_same(before: PublicTokenizer, after: PublicTokenizer) -> None:
    """Compares the ids of texts, but for the space that `told_difference` is about."""
    end = "" if told_difference(before) else " b"
    texts = [PROBE, *(f"a {before.text_of(i)}{end}" for i in before.eos_ids)]
    for text in texts:
        for specials in (False, True):
            if before.encode(text, specials=specials) != after.encode(text, specials=specials):
                raise UserError(
                    "llama.cpp would read text otherwise than this tokenizer does: the model can "
                    "be written as GGUF only without it"
                )
