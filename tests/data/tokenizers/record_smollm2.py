"""Records how transformers and llama.cpp tokenise hard texts and render chats with SmolLM2.

    python tests/data/tokenizers/record_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2.json

It needs transformers, gguf and llama-cpp-python, and a working directory outside the repository
(transformers would take our package `kernels` for another).
"""

import json
import sys
from pathlib import Path

TEXTS = [
    "Hello, world! It's 2024.",
    "def f(x):\n    if x > 10:\n\treturn x**2  # square\n\n\n    return {'a': [1, 2.5e-3]}\n",
    "3 33 333 3333 12345678 1.000.000,00 x\u00b2\u00bd\u2167",
    "日本語のテキスト、カタカナと漢字。한국어 문장입니다. 中文没有空格",
    "👩‍👩‍👧‍👦 🏳️‍🌈 emoji 😀😃 café naïve cafe\u0301 A\u030a",
    "   leading,  double   triple    \t tabs\t\t\n\n \n  trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_end|>x<repo_name>",
    "I'LL we'll DON'T 'tis rock'n'roll 'S 've",
    "https://example.com/a//b?c=d&e=%20#frag\r\nC:\\path\\to\r\n...!!!??? !important ~~/*--*/",
    "العربية हिन्दी ไทย עברית русский язык Ελληνικά",
    "\u00a0nbsp\u3000ideographic\u200bzero\ufeffbom\u2028line \x01 end",
    "a" * 50 + " " * 40 + "\n" * 7 + "=" * 33,
    "",
]

_USER = {"role": "user", "content": "What is {{ 2 + 2 }} <b>&'\"?"}
_ANSWER = {"role": "assistant", "content": "四\n"}
CHATS = [
    ([_USER], True),
    ([_USER, _ANSWER, _USER], True),
    ([{"role": "system", "content": "Be brief."}, _USER, _ANSWER], False),
]


def main(gguf: Path, out: Path) -> None:
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    ours = Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = []
    for text in TEXTS:
        plain = ours.tokenize(text.encode(), add_bos=True, special=False)
        special = ours.tokenize(text.encode(), add_bos=True, special=True)
        ids = theirs.encode(text)
        if ids != special:
            print("transformers and llama.cpp differ:", repr(text), ids, special)
        texts.append({"text": text, "plain": plain, "special": special})
    chats = [
        {
            "messages": messages,
            "add_generation_prompt": begins,
            "rendered": theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begins
            ),
        }
        for messages, begins in CHATS
    ]
    record = {"chat_template": theirs.chat_template, "texts": texts, "chats": chats}
    out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
