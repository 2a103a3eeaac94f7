"""Tokens with which models fill in the middle: where prefix, suffix and middle begin, and what may
end a middle (Bavarian et al., 2022, arXiv:2207.14255).
"""

from tokenizers import Tokenizer

MARKS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
"""Tokens that begin prefix, suffix and middle, as families of models spell them."""
ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "▁<EOT>", "</s>")
"""Tokens any of which may end a middle."""


def find_marks(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """The ids of the tokens that begin prefix, suffix and middle; None where there are none."""
    for names in MARKS:
        prefix, suffix, middle = (tokenizer.token_to_id(name) for name in names)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle
    return None
