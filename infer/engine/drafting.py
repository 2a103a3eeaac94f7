"""When drafts pay: what they gave, and what steps with and without them took.

R rows (sequences), N tokens of a row: the newest and its draft.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.choice import Logprobs
from infer.engine.ahead import MtpDrafter
from infer.engine.memory import Memory, mean_of
from infer.engine.options import EngineOptions
from infer.engine.programs import Programs
from infer.engine.routed import RoutedExperts, Span
from infer.engine.sampler import Chosen, Sampler, asks_logprobs, chosen_of
from infer.engine.sequence import TokenSequence
from infer.engine.types import ConstraintFailed
from infer.model_draft import DraftModel, ModelDraft
from infer.mtp_draft import MtpDraft
from infer.ngram_draft import NgramDraft, NgramIndex
from model.transformer import Transformer, Variables

PROBED = 64
"""Steps after which drafts that did not pay are tried again."""
KNOWN = 3
"""Steps of a kind before its time is believed; the first one compiles."""


@dataclass
class _Drafted:
    """What is known of one sequence's drafts."""

    index: NgramIndex | None = None
    size: int = 0
    """Tokens in the index."""
    accepted: float | None = None
    """Of a draft, on average."""


@dataclass
class _Times:
    """Seconds of steps of one kind."""

    count: int = 0
    mean: float | None = None

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count > 1:
            self.mean = mean_of(self.mean, seconds)


@dataclass
class Drafting:
    """Drafts for the rows of an engine, as long as they pay."""

    draft: NgramDraft | ModelDraft | MtpDraft
    small: DraftModel | None = None
    """Who drafts, where a smaller model does."""
    ahead: MtpDrafter | None = None
    """Who drafts, where the model's own module does."""
    rests: bool = False
    """Whether drafts did not pay when it was last asked."""
    _of: dict[int, _Drafted] = field(default_factory=dict)
    _plain: _Times = field(default_factory=_Times)
    _drafted: _Times = field(default_factory=_Times)
    _idle: int = 0
    """Steps without drafts, though there were some."""

    def propose(self, live: list[TokenSequence]) -> dict[TokenSequence, list[int]]:
        """The drafts of this step, of sequences that have some; none where they would not pay."""
        self._of = {s.number: self._of.get(s.number) or _Drafted() for s in live}
        room = {
            s: min(s.request.max_new_tokens - len(s.text) - 1, self.draft.length)
            for s in live
            if s.read + 1 == s.known
        }
        room = {s: most for s, most in room.items() if most > 0}
        if isinstance(self.draft, NgramDraft):
            found = {s: self._index(s, self.draft).propose(most) for s, most in room.items()}
            drafts = {s: tokens for s, tokens in found.items() if tokens}
            return drafts if self._pays(len(live), {s: len(d) for s, d in drafts.items()}) else {}
        pays = self._pays(len(live), room)
        self.rests = bool(room) and not pays
        if not pays:
            return {}
        if self.ahead is not None:
            return {s: draft[: room[s]] for s, draft in self.ahead.propose(list(room)).items()}
        assert self.small is not None
        wanted = {s.row: (s.number, s.tokens(0, s.known)) for s in room}
        said = self.small.propose(wanted, max(room.values()))
        return {s: said[s.row][:most] for s, most in room.items() if s.row in said}

    def _index(self, sequence: TokenSequence, draft: NgramDraft) -> NgramIndex:
        known = self._of[sequence.number]
        known.index = known.index or NgramIndex(draft)
        known.index.extend(sequence.tokens(known.size, sequence.known))
        known.size = sequence.known
        return known.index

    def _pays(self, num_rows: int, lengths: dict[TokenSequence, int]) -> bool:
        """Whether drafts of these lengths are worth a step with them; at times to find out."""
        if not lengths:
            return False
        if self._drafted.count < KNOWN or self._idle >= PROBED:
            self._idle = 0
            return True
        self._idle += 1
        if self._plain.count < KNOWN:
            return False
        assert self._plain.mean is not None
        assert self._drafted.mean is not None
        gained = 0.0
        for sequence, length in lengths.items():
            mean = self._of[sequence.number].accepted
            gained += length / 2 if mean is None else mean
        pays = (num_rows + gained) / self._drafted.mean > num_rows / self._plain.mean
        self._idle = 0 if pays else self._idle
        return pays

    def learn(
        self, seconds: float, drafts: dict[TokenSequence, list[int]], counts: dict[int, int]
    ) -> None:
        """Told what a step took, and how many tokens it gave each sequence, by number."""
        (self._drafted if drafts else self._plain).add(seconds)
        for sequence in drafts:
            known = self._of.get(sequence.number)
            if known is not None:
                known.accepted = mean_of(known.accepted, counts[sequence.number] - 1)


def new_drafting(
    options: EngineOptions, model: Transformer, variables: Variables, width: int
) -> Drafting | None:
    """Who drafts for an engine's rows; None: nobody, or its own first layers.

    Args:
      width: tokens of the widest program that reads prompts.
    """
    if isinstance(options.draft, NgramDraft):
        return Drafting(options.draft)
    if isinstance(options.draft, ModelDraft):
        small = DraftModel(options.draft, options.max_rows, options.max_length)
        return Drafting(options.draft, small)
    if isinstance(options.draft, MtpDraft):
        sizes = (options.max_rows, options.max_length, width)
        return Drafting(options.draft, ahead=MtpDrafter(options.draft, model, variables, *sizes))
    return None


class Verifier:
    """Runs the programs that verify drafts."""

    def __init__(
        self,
        programs: Programs,
        sampler: Sampler,
        routed: RoutedExperts | None = None,
        ahead: MtpDrafter | None = None,
    ) -> None:
        self._programs, self._sampler = programs, sampler
        self._routed, self._ahead = routed, ahead
        self._all_allowed: dict[int, jax.Array] = {}

    def run(
        self,
        live: list[TokenSequence],
        drafts: dict[TokenSequence, list[int]],
        width: int,
        memory: Memory,
        preference: Any,
    ) -> dict[TokenSequence, list[Chosen]]:
        """What each sequence says next; nothing for one whose text is read once more.

        Args:
          width: tokens of a row, the newest among them; 1 is a step without drafts.
        """
        num_rows, vocab = self._sampler.all_allowed_RV.shape
        failed, drafts, allowed_NRV = self._allowed(live, drafts, (width, num_rows, vocab))
        tokens_RN = np.zeros((num_rows, width), np.int32)
        positions_RN, is_live_R = np.full_like(tokens_RN, -1), np.zeros(num_rows, bool)
        repeated = [s for s in live if s.read + 1 < s.known]
        for sequence in live:
            tokens = [*sequence.tokens(sequence.read, sequence.read + 1), *drafts.get(sequence, [])]
            tokens_RN[sequence.row, : len(tokens)] = tokens
            positions_RN[sequence.row, : len(tokens)] = sequence.read + np.arange(len(tokens))
            is_live_R[sequence.row] = sequence not in repeated and sequence not in failed
        has_logprobs = asks_logprobs(live)
        made = self._programs.verify(
            tokens_RN,
            positions_RN,
            memory.state,
            memory.tables_RN,
            preference,
            self._sampler.rows,
            self._sampler.counts,
            allowed_NRV,
            is_live_R,
            np.bool_(has_logprobs),
            self._routed is not None,
            self._ahead is not None,
        )
        memory.state, self._sampler.counts = made.state, made.counts
        routed, hidden_RND = made.chosen, made.hidden_RND
        made = made._replace(state=None, counts=None, chosen=None, hidden_RND=None)
        made = jax.device_get(made if has_logprobs else made._replace(logprobs=None))
        chosen = {s: [Chosen(0, None, error)] for s, error in failed.items()}
        if self._routed is not None:
            counts = [max(int(made.count_R[s.row]), 1) for s in live]
            pairs = zip(live, counts, strict=True)
            self._routed.note(routed, [Span(s, s.row, 0, s.read, n) for s, n in pairs])
        for sequence in live:
            if sequence not in failed:
                count = int(made.count_R[sequence.row])
                chosen[sequence] = [_chosen_at(sequence, made, n) for n in range(count)]
        if self._ahead is not None:
            said = [(s, [c.token for c in x]) for s, x in chosen.items() if s not in failed and x]
            self._ahead.note(hidden_RND, [(s, s.read, tokens) for s, tokens in said])
        return chosen

    def _allowed(
        self,
        live: list[TokenSequence],
        drafts: dict[TokenSequence, list[int]],
        shape: tuple[int, int, int],
    ) -> tuple[dict[TokenSequence, str], dict[TokenSequence, list[int]], Any]:
        """Sequences that can't go on and why, drafts up to what constraints allow, and what may
        come after each of their tokens."""
        failed: dict[TokenSequence, str] = {}
        kept, masks = dict(drafts), {}
        for sequence in live:
            constraint = sequence.request.constraint
            if constraint is None or sequence.read + 1 < sequence.known:
                continue
            draft, accepted = drafts.get(sequence, []), 0
            try:
                for n in range(len(draft) + 1):
                    allowed_V = constraint.allowed_V()
                    if allowed_V is not None and not allowed_V.any():
                        raise ConstraintFailed("the constraint allows no token here")
                    masks[n, sequence.row] = True if allowed_V is None else allowed_V
                    if n == len(draft) or (allowed_V is not None and not allowed_V[draft[n]]):
                        break
                    constraint.accept(draft[n])
                    accepted += 1
            except ConstraintFailed as error:
                if not accepted and (0, sequence.row) not in masks:
                    failed[sequence] = str(error)
            kept[sequence] = draft[: max(accepted, 0)]
            if accepted and (accepted, sequence.row) not in masks:
                kept[sequence] = draft[: accepted - 1]  # what comes after it is not known
            constraint.rollback(accepted)
        if not masks:
            if shape[0] not in self._all_allowed:
                self._all_allowed[shape[0]] = jnp.ones(shape, jnp.bool_)
            return failed, kept, self._all_allowed[shape[0]]
        allowed_NRV = np.ones(shape, bool)
        for (n, row), allowed in masks.items():
            allowed_NRV[n, row] = allowed
        return failed, kept, allowed_NRV


def _chosen_at(sequence: TokenSequence, made: Any, n: int) -> Chosen:
    """A sequence's n-th token of what the program made."""
    logprobs = None
    if made.logprobs is not None:
        logprobs = Logprobs(*(x[:, n] for x in made.logprobs))
    return chosen_of(sequence, _At(made.tokens_RN[:, n], made.is_broken_RN[:, n]), logprobs)


@dataclass
class _At:
    token_R: np.ndarray
    is_broken_R: np.ndarray
