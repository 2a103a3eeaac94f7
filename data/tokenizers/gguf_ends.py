"""Tokens that end an answer in a GGUF file, by llama.cpp's rules (src/llama-vocab.cpp): the file
names some by id, and others are known by how they are spelt.
"""

from collections.abc import Mapping, Sequence

END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
    }
)
NAMES = ("eos", "eot", "eom")
"""tokenizer.ggml.NAME_token_id each."""
END_OF_MESSAGE = "<|eom_id|>"
FILL_IN_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens of filling in the middle that end an answer too: those that the file names by id, or the
first that is spelt so."""
NOT_ENDS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|return|>", "<|calls|>"}),
    ("<|end|>", {"<|flush|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)
"""(token, others): beside all these others it does not end an answer, but a message in it."""


def end_ids(tokens: Sequence[str], named: Mapping[str, int | None]) -> frozenset[int]:
    """Ids of the tokens that end an answer.

    Args:
      tokens: by id.
      named: ids that the file names, by NAMES and the names of FILL_IN_TEXTS.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ends = {ids[text] for text in END_TEXTS if text in ids}
    for name, texts in FILL_IN_TEXTS.items():
        if named.get(name) is None:
            ends |= set([ids[text] for text in texts if text in ids][:1])
    ends |= {i for name in (*NAMES, *FILL_IN_TEXTS) if (i := named.get(name)) is not None}
    for token, others in NOT_ENDS:
        if others <= ids.keys() and token in ids:
            ends.discard(ids[token])
    return frozenset(ends)
