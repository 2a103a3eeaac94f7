"""Records what TRL's SFTTrainer makes of chats of unequal lengths: recorded_sft.json.

python tests/train/record_sft.py        in an environment with torch and trl

Its own collator, masks and loss, of a random Llama whose logits are recorded beside them: the mean
over the assistant's tokens of all chats of a batch.
"""

import json
import tempfile
from pathlib import Path

VOCAB = 17
CHATS = [
    "user: 5 6 7 / assistant: 8 9",
    "system: 10 / user: 5 / assistant: 11 12 13 / user: 6 / assistant: 14",
    "user: 15 16 5 6 7 8 / assistant: 9 10 11 12",
]
"""Their words are the tokens' numbers."""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}2 "
    "{% generation %}{{ m.content }} <end> {% endgeneration %}"
    "{% else %}{{ 4 if m.role == 'system' else 3 }} {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}2 {% endif %}"
)
WORDS = {"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, VOCAB)}


def messages(chat: str) -> list[dict[str, str]]:
    turns = [turn.split(": ") for turn in chat.split(" / ")]
    return [{"role": role, "content": content} for role, content in turns]


def record() -> None:
    """Logits and labels as its collator pads them, and the loss."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads, initializer_range=0.5))
    words = Tokenizer(models.WordLevel(WORDS, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **ends)
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            per_device_train_batch_size=len(CHATS),
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"messages": messages(x)} for x in CHATS]),
            processing_class=tokenizer,
        )
        trainer.model.train()
        (batch,) = list(trainer.get_train_dataloader())
        with torch.no_grad():
            logits = LlamaForCausalLM.forward(
                trainer.model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        loss = trainer.compute_loss(trainer.model, dict(batch))
    kept = {name: batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")}
    kept |= {"loss": float(loss.detach()), "logits": logits.tolist()}
    (Path(__file__).parent / "recorded_sft.json").write_text(json.dumps(kept))
    print(kept["loss"], kept["labels"])


if __name__ == "__main__":
    record()
