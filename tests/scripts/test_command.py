"""Exit codes: each says what happened, and an alarm's is nobody else's."""

import errno

import pytest

from configs.checks import UserError
from scripts import command, train
from train.metrics import TrainingAlarm


class Left(Exception):
    """In the place of the process's end."""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (TrainingAlarm("loss is nan"), 1, "stopped: loss is nan"),
        (UserError("no such run"), 2, "error: no such run"),
        (OSError(errno.ENOSPC, "No space left", "f.txt"), 2, "error: f.txt can't be used"),
        (OSError("of a library"), 3, "Traceback"),
        (ZeroDivisionError("ours"), 3, "ZeroDivisionError: ours"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_end_has_its_code(monkeypatch, error, code, sentence):
    def leave(number, text):
        raise Left(number, text)

    def main(_argv):
        raise error

    monkeypatch.setattr(command, "_leave", leave)
    with pytest.raises(Left) as left:
        command.execute(main)
    number, text = left.value.args
    assert number == code
    assert sentence in text


def test_a_student_is_not_trained_without_its_teacher_in_silence():
    with pytest.raises(
        UserError, match=r"scripts\.distill v31_nano_student --teacher runs/TEACHER"
    ):
        train.main(["v31_nano_student"])
