"""Settings of distillation: what a student minimises, who teaches it, who writes the text."""

from dataclasses import dataclass
from typing import Literal, get_args

from configs.checks import require, require_positive

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "total_variation"
]
LossKind = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
    "cross_entropy",
    "hidden",
    "attention",
]
DEFAULT_BETA: dict[str, float] = {"jsd": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}
"""Of the divergences with a beta, what it is where none is given."""
MATCHING = ("hidden", "attention")
"""Terms that compare layers instead of predictions."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One term of a student's objective, and when it counts."""

    kind: LossKind
    """p is the teacher's, q the student's distribution of the next token, both softened:
    forward_kl KL(p||q), reverse_kl KL(q||p), jsd beta KL(p||m) + (1 - beta) KL(q||m) with
    m = beta p + (1 - beta) q, skewed_kl KL(p || beta p + (1 - beta) q), skewed_reverse_kl
    KL(q || beta q + (1 - beta) p), total_variation half the sum of |p - q|; cross_entropy of the
    data; hidden (a layer's result) and attention (what its attention adds): the squared distance
    of a learned projection of the student's from the teacher's, over the teacher's square."""
    weight: float = 1.0
    """0: the term is logged alone."""
    final_weight: float | None = None
    """What the weight has become at `end`, on a line from `weight` at `begin`; None: it stays."""
    begin: float = 0.0
    """Share of the run's steps before the term counts."""
    end: float = 1.0
    """Share of the run's steps after which it no longer counts."""
    beta: float | None = None
    """Of jsd (0.5 if None), skewed_kl and skewed_reverse_kl (0.1)."""
    layers: tuple[int, ...] = ()
    """Of hidden and attention: the student's layers that are compared, from 0; empty: all. Each is
    compared with the teacher's layer at the same share of its depth."""

    def __post_init__(self) -> None:
        name = f"distill.losses: {self.kind}"
        for weight in (self.weight, self.final_weight):
            require(weight is None or weight >= 0, f"{name}.weight={weight} must not be negative")
        require(
            0 <= self.begin < self.end <= 1,
            f"{name} has begin={self.begin} and end={self.end}, shares of the run: "
            "0 <= begin < end <= 1 is needed",
        )
        check_beta(self.kind, self.beta, name)
        require(
            not self.layers or self.kind in MATCHING,
            f"{name} compares predictions, layers={self.layers} has no effect: leave it out",
        )
        require(
            min(self.layers, default=0) >= 0 and len(set(self.layers)) == len(self.layers),
            f"{name}.layers={self.layers} must be different layers of the student, from 0",
        )

    @property
    def is_constant(self) -> bool:
        """Whether its weight is the same in every step."""
        is_whole = (self.begin, self.end) == (0.0, 1.0)
        return is_whole and self.final_weight in (None, self.weight)

    def weight_at(self, step: int, steps: int) -> float:
        """The weight in step `step` (from 0) of a run of so many steps."""
        place = step / steps
        if not self.begin <= place < self.end:
            return 0.0
        if self.final_weight is None:
            return self.weight
        last = max(self.end - 1 / steps, self.begin)  # where the last step of the term lies
        passed = 1.0 if last == self.begin else (place - self.begin) / (last - self.begin)
        return self.weight + min(passed, 1.0) * (self.final_weight - self.weight)


def check_beta(kind: str, beta: float | None, name: str) -> None:
    """
    Raises:
      UserError: a beta that the divergence has not, or outside (0, 1).
    """
    if beta is None:
        return
    require(
        kind in DEFAULT_BETA,
        f"{name} has no beta, got {beta}: leave it out ({', '.join(DEFAULT_BETA)} have one)",
    )
    require(0 < beta < 1, f"{name}.beta={beta} must lie in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Rows that the student writes itself and the teacher marks (GKD, Agarwal et al. 2023)."""

    share: float = 0.0
    """Of each batch's rows, lambda; 0: all rows are data. The data's cross-entropy counts in the
    other rows alone."""
    prompt_length: int | None = None
    """Tokens that a written row keeps of its row of data, or of the last document in them; the
    student goes on from there. 32 if None. Of chats, None: all before the first answer."""
    temperature: float = 1.0
    """At which the student writes."""
    replay: bool = True
    """Whether the training pass sends each token to the experts that it had while it was written;
    without, the share that goes elsewhere is logged alone ("routing_changed")."""

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"distill.on_policy.share={self.share} must lie in [0, 1]")
        require_positive(self, "temperature")
        require(
            self.prompt_length is None or self.prompt_length > 0,
            f"distill.on_policy.prompt_length={self.prompt_length} must be at least 1",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """The say of one of several teachers."""

    weight: float = 1.0
    """Its share of the mixed distribution is this over the sum of the weights in that row."""
    sources: tuple[str, ...] = ()
    """Sources of data.mixture whose rows it teaches; empty: all rows."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"distill.teachers: weight={self.weight} must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A divergence from a frozen teacher plus cross-entropy on the data; or any sum of terms."""

    temperature: float = 1.0
    """Both distributions are softened by it; divergences are multiplied by its square."""
    kl_weight: float = 0.9
    """Weight of the divergence; the cross-entropy has 1 - kl_weight."""
    divergence: Divergence = "forward_kl"
    """See LossTerm."""
    beta: float | None = None
    """See LossTerm."""
    losses: tuple[LossTerm, ...] = ()
    """The whole objective, in the place of divergence, beta and kl_weight."""
    top_k: int | None = None
    """Teacher tokens kept, the rest in one tail bin; None compares whole distributions."""
    cache: bool = False
    """Keep the teacher's top_k on disk and reuse them when a row of data comes again."""
    cache_directory: str | None = None
    """A cache made ahead (scripts.distill --make-cache), which several students can read; then no
    teacher is loaded."""
    teachers: tuple[TeacherShare, ...] = ()
    """Of several teachers, in the order in which they are named; empty: equal shares."""
    on_policy: OnPolicyConfig = OnPolicyConfig()
    vocabulary: Literal["same", "bytes"] = "same"
    """same: the teacher must number tokens as the student does. bytes: it has a tokenizer of its
    own, and the two are compared where their tokens' borders in the text agree."""
    unmatched_weight: float | None = None
    """vocabulary="bytes": weight of the sorted distance between what only one of the two has (ULD,
    Boizard et al. 2024); 1 if None."""
    drafter: bool = False
    """Whether the student is to draft for the teacher: the share of its drafts that the teacher
    would accept is logged ("acceptance"; with top_k at most so many, since bins hide differences).
    scripts.acceptance measures it on held-out text."""

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require(0 <= self.kl_weight <= 1, f"distill.kl_weight={self.kl_weight} must lie in [0, 1]")
        check_beta(self.divergence, self.beta, f"distill.divergence={self.divergence!r}")
        require(
            self.top_k is None or self.top_k > 0,
            f"distill.top_k={self.top_k} must be at least 1, or None for the whole vocabulary",
        )
        require(
            not self.cache or self.top_k is not None,
            "distill.cache=True needs distill.top_k: whole distributions are too large to keep",
        )
        self._check_losses()
        self._check_cache()
        self._check_vocabulary()
        require(
            not self.drafter or (self.temperature == 1 and self.vocabulary == "same"),
            "distill.drafter=True needs distill.temperature=1 and one vocabulary: drafts are "
            f"accepted by the distributions as they are; got temperature={self.temperature} and "
            f"vocabulary={self.vocabulary!r}",
        )

    def _check_losses(self) -> None:
        if not self.losses:
            return
        for name in ("divergence", "beta", "kl_weight"):
            value, default = getattr(self, name), getattr(DistillConfig, name)
            require(
                value == default,
                f"distill.{name}={value!r} has no effect beside distill.losses, which are the "
                "whole objective: leave it out",
            )
        written = {term.kind for term in self.losses} & set(get_args(Divergence))
        require(
            not self.on_policy.share or bool(written),
            f"distill.on_policy.share={self.on_policy.share} gives rows that the teacher marks, "
            "and distill.losses have no divergence from it: add one",
        )

    def _check_cache(self) -> None:
        if self.cache_directory is not None:
            require(
                self.top_k is not None and not self.cache,
                "distill.cache_directory names a cache made ahead: it needs the distill.top_k that "
                f"is read of it, and no distill.cache of the run's own; got top_k={self.top_k}, "
                f"cache={self.cache}",
            )
        cached = self.cache or self.cache_directory is not None
        kinds = [term.kind for term in self.losses if term.kind in MATCHING]
        require(
            not cached or not kinds,
            f"distill.losses compare layers ({', '.join(kinds)}), which no cache holds: leave the "
            "cache out",
        )
        require(
            not cached or not self.on_policy.share,
            f"distill.on_policy.share={self.on_policy.share} gives the teacher rows that are new "
            "each time, and no cache holds them: leave the cache out",
        )

    def _check_vocabulary(self) -> None:
        if self.vocabulary == "same":
            require(
                self.unmatched_weight is None,
                f"distill.unmatched_weight={self.unmatched_weight} has no effect with "
                "distill.vocabulary='same': leave it out",
            )
            return
        require(
            self.unmatched_weight is None or self.unmatched_weight >= 0,
            f"distill.unmatched_weight={self.unmatched_weight} must not be negative",
        )
        given = {
            "top_k": self.top_k,
            "teachers": self.teachers or None,
            "cache_directory": self.cache_directory,
        }
        names = [name for name, value in given.items() if value is not None]
        require(
            not names,
            f"distill.vocabulary='bytes' compares whole distributions of one teacher: leave "
            f"{' and '.join(names)} out",
        )
        require(
            not self.matching,
            "distill.vocabulary='bytes' compares places of other tokens, and distill.losses the "
            "layers of the same ones: leave one out",
        )

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The objective, term by term."""
        if self.losses:
            return self.losses
        divergence = LossTerm(kind=self.divergence, weight=self.kl_weight, beta=self.beta)
        return divergence, LossTerm(kind="cross_entropy", weight=1.0 - self.kl_weight)

    def weights_at(self, step: int, steps: int) -> tuple[float, ...]:
        """The weight of each term in step `step` (from 0) of a run of so many steps."""
        return tuple(term.weight_at(step, steps) for term in self.terms)

    @property
    def matching(self) -> tuple[LossTerm, ...]:
        """The terms that compare layers."""
        return tuple(term for term in self.terms if term.kind in MATCHING)
