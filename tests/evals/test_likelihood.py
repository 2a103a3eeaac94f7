"""Log-likelihoods: the border in tokens, and sums against a plain pass over each text."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from configs.architecture import LayerSpec, ModelConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig
from data.tokenizers.public_tokenizer import PublicTokenizer
from evals import likelihood
from evals.likelihood import Pair, bucket, encode_pair, first_id, score_pairs
from infer.logits import full_logits
from model.transformer import Transformer
from tests import tiny
from tests.checkpoint.tiny_folder import byte_level
from tests.probes import drawn

CAPITAL = "The capital of France is"


@pytest.fixture(scope="module")
def tokenizer():
    return PublicTokenizer(byte_level(), bos_id=None, eos_ids=frozenset({0}), add_bos=False)


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    return dataclasses.replace(tokenizer, bos_id=1, add_bos=True)


def in_text(tokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """Context and continuation in tokens."""
    return list(pair.tokens[: pair.begin]), list(pair.targets)


def test_both_are_encoded_together(tokenizer):
    pair = encode_pair(tokenizer, CAPITAL, " Paris", 99)
    whole, before = tokenizer.encode(CAPITAL + " Paris"), tokenizer.encode(CAPITAL)
    assert whole[: len(before)] == before
    assert in_text(tokenizer, pair) == (before, whole[len(before) :])
    assert pair.tokens == tuple(whole[:-1])


def test_blanks_at_the_end_belong_to_the_continuation(tokenizer):
    assert encode_pair(tokenizer, CAPITAL + " ", "Paris", 99) == encode_pair(
        tokenizer, CAPITAL, " Paris", 99
    )
    newline = encode_pair(tokenizer, CAPITAL + ":\n\n", "Paris", 99)
    before = tokenizer.encode(CAPITAL + ":")
    assert in_text(tokenizer, newline)[0] == before
    assert tokenizer.decode(newline.targets) == "\n\nParis"


def test_an_empty_context_is_the_token_that_begins_or_ends_a_text(tokenizer, with_bos):
    paris = tokenizer.encode("Paris")
    for it, first in ((tokenizer, 0), (with_bos, 1)):
        assert in_text(it, encode_pair(it, "", "Paris", 99)) == ([first], paris)
        blank = encode_pair(it, "  ", "Paris", 99)
        assert in_text(it, blank) == ([first], tokenizer.encode("  Paris"))
    unnamed = dataclasses.replace(tokenizer, eos_ids=frozenset(), eos_id=None)
    assert first_id(unnamed) == 0  # known by its name, <|endoftext|>
    nameless = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(UserError, match="no token that begins or ends a text"):
        first_id(dataclasses.replace(unnamed, tokenizer=nameless))


def test_bos_begins_a_context_once(tokenizer, with_bos):
    pair = encode_pair(with_bos, CAPITAL, " Paris", 99)
    assert in_text(with_bos, pair)[0] == [1, *tokenizer.encode(CAPITAL)]
    assert pair.targets == encode_pair(tokenizer, CAPITAL, " Paris", 99).targets


def test_an_empty_continuation_has_no_tokens(tokenizer):
    assert encode_pair(tokenizer, CAPITAL + "  ", "", 99) == Pair((), ())


def test_long_contexts_lose_their_beginning(tokenizer):
    whole = encode_pair(tokenizer, CAPITAL, " Paris", 99)
    assert len(whole.tokens) > 8
    cut = encode_pair(tokenizer, CAPITAL, " Paris", 8)
    assert cut.tokens == whole.tokens[-8:]
    assert cut.targets == whole.targets
    assert cut.num_dropped == len(whole.tokens) - 8
    with pytest.raises(UserError, match=r"a continuation has .* tokens, the model reads 2 at once"):
        encode_pair(tokenizer, CAPITAL, " Paris Paris Paris", 2)


def test_characters_of_several_tokens_are_not_cut(tokenizer):
    """The border may lie between two tokens of bytes of one character only in a text's middle."""
    pair = encode_pair(tokenizer, "日", "本語🙂", 99)
    before, after = in_text(tokenizer, pair)
    assert tokenizer.decode([*before, *after]) == "日本語🙂"
    assert tokenizer.decode(after) == "本語🙂"
    with pytest.raises(UserError, match="a sample is no UTF-8 at character 2"):
        encode_pair(tokenizer, "a\udcff", "b", 99)


def test_a_continuation_whose_token_the_context_ends_in(tokenizer):
    """Merged with what stands before, it takes the merged token: one is left to be predicted."""

    class Merging:
        """Writes "ab" as one token, and nothing else together."""

        bos_id, eos_id, eos_ids = None, 0, frozenset({0})

        def encode(self, text, *, bos=None):
            return [{"ab": 7, "a": 1, "b": 2}[text]]

    pair = encode_pair(Merging(), "a", "b", 99)
    assert pair == Pair((0,), (7,))


# --- Sums -----------------------------------------------------------------------------------------


def logits(model, variables, tokens) -> np.ndarray:
    """All of one length, for a single program; what stands before sees nothing of what follows."""
    padded = [*tokens, *[0] * (64 - len(tokens))]
    return full_logits(model, variables, padded)[: len(tokens)].astype(np.float64)


def oracle(model, variables, pair: Pair) -> tuple[float, bool]:
    """By the logits of the whole, one pair at a time, in double precision."""
    logits_LV = logits(model, variables, pair.tokens)
    shifted = logits_LV - logits_LV.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    places = range(len(pair.tokens) - len(pair.targets), len(pair.tokens))
    nats = sum(log_p[place, target] for place, target in zip(places, pair.targets, strict=True))
    best = all(
        log_p[place].argmax() == target for place, target in zip(places, pair.targets, strict=True)
    )
    return float(nats), best


def recurrent_model() -> ModelConfig:
    """A recurrent layer, whose sequences need rows to themselves, and one with a window."""
    delta = GatedDeltaConfig(num_heads=2, key_head_dim=8, value_head_dim=8)
    layers = (delta, tiny.attention())
    return tiny.model(
        pattern=tuple(LayerSpec(attention=x, ffn=DenseConfig(d_ff=24)) for x in layers)
    )


MODELS = {
    "windows and experts": tiny.model,
    "memory": tiny.memory_model,
    "recurrent": recurrent_model,
}


@pytest.fixture(
    scope="module",
    params=["windows and experts", "memory", pytest.param("recurrent", marks=pytest.mark.slow)],
)
def made(request):
    config = MODELS[request.param]()
    model = Transformer(config, ExecutionConfig(transport="gather", capacity_factor=None))
    return model, drawn(config)


def questions(random: np.random.RandomState, model, variables) -> list[Pair]:
    """Contexts of all lengths with two to four choices, some alike, some likeliest."""
    pairs = []
    for length in (1, 20, 23, 47, 60):
        context = random.randint(1, 300, length).tolist()
        best = int(logits(model, variables, context)[-1].argmax())
        choices = [[best], random.randint(1, 300, 3).tolist(), random.randint(1, 300, 1).tolist()]
        choices.append(choices[1])
        for choice in choices:
            pairs.append(Pair(tuple([*context, *choice][:-1]), tuple(choice)))
    return [*pairs, Pair((), ())]


@pytest.mark.thinned(2)
def test_sums_are_those_of_each_text_alone(made):
    model, variables = made
    random = np.random.RandomState(0)
    pairs = questions(random, model, variables)
    wanted = [oracle(model, variables, p) if p.targets else (0.0, True) for p in pairs]
    assert sum(best for _, best in wanted[:-1]) >= 5
    order = random.permutation(len(pairs))
    for batch_tokens, share in ((4096, True), (100, True), (4096, False)):
        came: list[int] = []
        found = score_pairs(
            model,
            variables,
            [pairs[i] for i in order],
            batch_tokens=batch_tokens,
            share_contexts=share,
            on_answer=lambda i, _, came=came: came.append(i),
        )
        assert sorted(came) == list(range(len(pairs)))
        for i, one in zip(order, found, strict=True):
            nats, is_greedy = wanted[i]
            assert one.nats == pytest.approx(nats, abs=2e-4)
            assert one.is_greedy == is_greedy
            assert one.num_tokens == len(pairs[i].targets)


def test_contexts_are_read_once_where_that_saves(made, monkeypatch):
    model, variables = made
    context, seen = tuple(range(1, 41)), []
    pairs = [Pair((*context, 7, 8)[: 40 + n], (7, 8, 9)[: n + 1]) for n in (0, 1, 2)]
    read = likelihood._padded

    def counting(rows, *arguments):
        seen.extend(len(piece) for row in rows for piece in row)
        return read(rows, *arguments)

    monkeypatch.setattr(likelihood, "_padded", counting)
    score_pairs(model, variables, pairs, batch_tokens=4096)
    once = model.config.memory_length is None
    assert sum(seen) == (39 + 1 + 2 + 3 if once else 40 + 41 + 42)


def test_lengths_are_few_and_little_is_padding():
    lengths = {bucket(n) for n in range(1, 2000)}
    assert len(lengths) == 15
    assert all(bucket(n) >= n for n in range(1, 2000))
    assert max(bucket(n) / n for n in range(17, 2000)) < 1.5


def test_rows_hold_texts_to_about_one_length():
    """Whatever the texts, little of a row is padding, and each is there once."""
    random = np.random.RandomState(0)
    texts = [tuple(range(n)) for n in random.randint(1, 200, 400)]
    batches = list(likelihood._row_batches(texts, 4096, is_mixed=True))
    assert sorted(text for rows in batches for row in rows for text in row) == sorted(texts)
    for rows in batches:
        sizes = [sum(map(len, row)) for row in rows]
        assert len(rows) == 1 << (len(rows).bit_length() - 1)
        assert len(rows) * likelihood.whole_step(max(sizes)) <= max(1.3 * sum(sizes), 64)
    alone = list(likelihood._row_batches(texts, 4096, is_mixed=False))
    assert all(len(row) == 1 for rows in alone for row in rows)
