"""Records what TRL's DPOTrainer makes of drawn logits: recorded_dpo.json.

python tests/train/record_dpo.py        in an environment with torch and trl
"""

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PAIRS, LENGTH, VOCAB, BETA = 3, 7, 11, 0.3


def drawn() -> dict[str, Any]:
    """Logits of the model and of the reference at each place, the next tokens, and which count; the
    chosen rows first.
    """
    rng = np.random.default_rng(0)
    shape = (2 * PAIRS, LENGTH, VOCAB)
    logits, reference = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, VOCAB, shape[:2])
    begins, ends = rng.integers(0, 3, 2 * PAIRS), rng.integers(4, LENGTH + 1, 2 * PAIRS)
    places = np.arange(LENGTH)
    counts = (places >= begins[:, None]) & (places < ends[:, None])
    return {"logits": logits, "reference": reference, "targets": targets, "counts": counts}


def record() -> None:
    """Loss, rewards and gradient."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    made = drawn()
    targets = torch.tensor(made["targets"])
    counts = torch.tensor(made["counts"])

    def model_of(logits: torch.Tensor) -> Any:
        def model(**_: Any) -> SimpleNamespace:
            found = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
            zero = torch.tensor(0.0)
            masked = torch.where(counts, found, zero)
            nothing = torch.zeros_like(masked)  # what else it reports
            others = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
            return SimpleNamespace(log_probs=masked, logits=logits, loss=zero, **others)

        return model

    logits = torch.tensor(made["logits"], requires_grad=True)
    metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
    accelerator = SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x, reduce=lambda x, **_: x
    )
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True, config=SimpleNamespace()),
        ref_model=model_of(torch.tensor(made["reference"])),
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, loss_type=["sigmoid"]),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        state=SimpleNamespace(num_input_tokens_seen=0),
    )
    trainer.model.disable_adapter = contextlib.nullcontext
    first = torch.zeros((2 * PAIRS, 1), dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([first, targets], 1),
        "attention_mask": torch.ones((2 * PAIRS, LENGTH + 1), dtype=torch.long),
        "completion_mask": torch.cat([first, counts.long()], 1),
    }
    import trl.trainer.dpo_trainer as module

    module.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    module.is_peft_model = lambda _: False
    loss = DPOTrainer._compute_loss(trainer, model_of(logits), inputs, False)
    loss.backward()
    found = {name: float(np.mean(values)) for name, values in metrics["train"].items()}
    kept = {"loss": float(loss), "metrics": found, "gradient": logits.grad.numpy().tolist()}
    (Path(__file__).parent / "recorded_dpo.json").write_text(json.dumps(kept))
    print(kept["loss"], found)


if __name__ == "__main__":
    record()
