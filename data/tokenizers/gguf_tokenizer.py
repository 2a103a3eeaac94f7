"""The tokenizer inside a GGUF file.

llama.cpp names how a text is cut before its merges (`tokenizer.ggml.pre`); the cut itself is in the
table below, as the models' own tokenizer.json have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from configs.checks import UserError
from data.tokenizers.gguf_ends import FILL_IN_TEXTS, end_ids
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import malformed

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of llama.cpp."""

GEMMA4 = "gemma4"
"""llama.cpp's name for a SentencePiece with merges, whose texts always begin with bos."""

LINES = {
    "type": "Split",
    "pattern": {"Regex": r"\n+"},
    "behavior": "Isolated",
    "invert": False,
}
"""How it cuts text, in a tokenizer.json."""

SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}
"""llama.cpp's, where a file with such a tokenizer names none."""

LONGEST_TOKEN = 2048
"""Letters; runs of spaces are the longest, some hundred."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽ"
    "ᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-"
    "Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Of alphabets with upper and lower case, as DeepSeek-V2 was trained."""
_DEEPSEEK2 = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How a text is cut into pieces, inside which alone tokens merge."""

    patterns: tuple[str, ...]
    """Regular expressions, each applied to the pieces of the one before."""
    is_composed: bool = False
    """Whether the text is brought into Unicode's form NFC first, as the model was trained;
    llama.cpp leaves that out."""
    ignores_merges: bool = False
    """Whether a piece that is a token is never taken apart."""
    adds_bos: bool = False
    """Where the file doesn't say."""


CUTS = {
    "gpt-2": Cut((_GPT2,)),
    "smollm": Cut((r"\p{N}", _GPT2)),
    "starcoder": Cut((r"\p{N}", _GPT2)),
    "olmo": Cut((_GPT2,), is_composed=True),
    "llama-bpe": Cut((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "llama-v3": Cut((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "llama3": Cut((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "qwen2": Cut((_QWEN2,), is_composed=True),
    "deepseek-r1-qwen": Cut((_QWEN2,), is_composed=True),
    "gpt-4o": Cut((_O200K,)),
    "llama4": Cut((_O200K,)),
    "deepseek-llm": Cut(_DEEPSEEK2),
    "deepseek-v3": Cut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
}
"""By what tokenizer.ggml.pre says; of equal ones the first is written."""


class _Values:
    """Metadata asked by name and type."""

    def __init__(self, metadata: dict[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(name, default)
        if value is not default and type(value) is not kind:
            raise UserError(
                f"{self.where} has {name}={str(value)[:60]!r}, expected a {kind.__name__}"
            )
        return value

    def items(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        value = self.get(name, list)
        if value is None or any(type(item) is not kind for item in value):
            raise UserError(f"{self.where} lacks {name}, a list of {kind.__name__}")
        if length is not None and len(value) != length:
            raise UserError(f"{self.where} has {len(value)} {name}, expected {length}")
        return value


def tokenizer_from_gguf(metadata: dict[str, Any], where: str) -> PublicTokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Args:
      where: the file, for sentences.
    Raises:
      UserError: a kind of tokenizer that is not built here, or values that contradict each other.
    """
    values = _Values(metadata, where)
    tokens = values.items("tokenizer.ggml.tokens", str)
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = values.items("tokenizer.ggml.token_type", int, len(tokens))
    _check_tokens(tokens, where)
    kind = values.get("tokenizer.ggml.model", str)
    ids = _special_ids(values, len(tokens), SENTENCEPIECE_IDS if kind == "llama" else {})
    ends = end_ids(tokens, ids)
    types = [CONTROL if i in ends else of_token for i, of_token in enumerate(types)]
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(values, tokens)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(values, tokens, types)
    elif kind == GEMMA4:
        tokenizer, adds_bos = _by_line(values, tokens, types), True
    else:
        raise UserError(
            f"{where} has a tokenizer of the kind {kind!r}, expected 'gpt2', 'llama' or "
            f"{GEMMA4!r}: put the model's tokenizer.json into a folder and name that"
        )
    _add_specials(tokenizer, tokens, types)
    tokenizer.encode_special_tokens = True
    eos_id = ids["eos"] if ids["eos"] is not None else ids["eot"]
    return PublicTokenizer(
        tokenizer=tokenizer,
        bos_id=ids["bos"],
        eos_ids=ends,
        eos_id=min(ends, default=None) if eos_id is None else eos_id,
        add_bos=values.get("tokenizer.ggml.add_bos_token", bool, adds_bos) or kind == GEMMA4,
        chat_template=values.get("tokenizer.chat_template", str),
    )


def _check_tokens(tokens: list[str], where: str) -> None:
    seen = set()
    for token in tokens:
        if token in seen or len(token) > LONGEST_TOKEN:
            fault = "twice" if token in seen else f"of more than {LONGEST_TOKEN} letters"
            raise UserError(f"{where} has the token {token[:60]!r} {fault}")
        seen.add(token)


def _special_ids(
    values: _Values, vocab_size: int, defaults: Mapping[str, int]
) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "eot", "eom", *FILL_IN_TEXTS):
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = values.get(key, int)
        if token_id is None and defaults.get(name, vocab_size) < vocab_size:
            token_id = defaults[name]
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise UserError(f"{values.where} has {key}={token_id}, but {vocab_size} tokens")
        ids[name] = token_id
    return ids


def _byte_level(values: _Values, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """BPE over bytes, and whether texts begin with bos unless the file says otherwise."""
    pre = values.get("tokenizer.ggml.pre", str)
    if pre not in CUTS:
        raise UserError(
            f"{values.where} has tokenizer.ggml.pre={pre!r}, expected one of "
            f"{', '.join(CUTS)}: put the model's tokenizer.json into a folder and name that"
        )
    cut = CUTS[pre]
    merges = _split_merges(values)
    vocab = {token: i for i, token in enumerate(tokens)}
    model = _bpe(values, vocab, merges, ignore_merges=cut.ignores_merges)
    tokenizer = Tokenizer(model)
    if cut.is_composed:
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizer(cut)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer, cut.adds_bos


def pre_tokenizer(cut: Cut) -> Any:
    """Of the tokenizers package."""
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in cut.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, bytes_])


def _split_merges(values: _Values) -> list[tuple[str, str]]:
    merges = []
    for merge in values.items("tokenizer.ggml.merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise UserError(
                f"{values.where} has the merge {merge!r}, expected two pieces with a space between"
            )
        merges.append((left, right))
    return merges


def _bpe(
    values: _Values, vocab: dict[str, int], merges: Sequence[tuple[str, str]], **settings: Any
) -> models.BPE:
    with malformed(f"{values.where} has merges that don't fit its tokens", "download it again"):
        return models.BPE(vocab=vocab, merges=list(merges), **settings)


def _sentencepiece(values: _Values, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """BPE over characters with bytes for the rest (Llama-2, Mixtral), merged by the tokens' scores:
    a pair merges when what it makes is a token, the best score first.
    """
    scores = values.items("tokenizer.ggml.scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    mergeable = {t: i for t, i in vocab.items() if types[i] in (NORMAL, USER_DEFINED)}
    merges = []
    for token, i in mergeable.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in mergeable and b in mergeable]
        merges += [(-scores[i], i, pair) for pair in sorted(pairs, key=lambda p: vocab[p[0]])]
    merges.sort(key=lambda merge: merge[:2])
    has_prefix = values.get("tokenizer.ggml.add_space_prefix", bool, True)
    pairs = [merge[2] for merge in merges]
    return _of_characters(values, tokens, types, pairs, has_prefix=has_prefix), True


def _by_line(values: _Values, tokens: list[str], types: list[int]) -> Tokenizer:
    """As _sentencepiece, with merges of its own, and none across the ends of lines."""
    merges = _split_merges(values)
    tokenizer = _of_characters(values, tokens, types, merges, has_prefix=False)
    lines = pre_tokenizers.Split(Regex(LINES["pattern"]["Regex"]), "isolated")
    tokenizer.pre_tokenizer = lines  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _of_characters(
    values: _Values,
    tokens: list[str],
    types: list[int],
    merges: Sequence[tuple[str, str]],
    *,
    has_prefix: bool,
) -> Tokenizer:
    """
    Args:
      has_prefix: whether a text begins with a space that it hasn't.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = _bpe(values, vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    stripped = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    if has_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(spaces)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _add_specials(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if token and kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
