"""`cascade-lab finetune` fine-tunes a BERT classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.console import shows_progress, spinner
from cascade_lab.cli.options import (
    COLUMNS,
    DO_LOWER_CASE,
    ENCODING,
    NEW_DIRECTORY,
    OVERWRITE,
    TEXT_COLUMN,
    TRAINING_SET,
    read_columns,
    read_labels,
)
from cascade_lab.cli.printing import line, next_step


def finetune(
    init: Annotated[
        str,
        typer.Option(help="The BERT checkpoint to start from (directory or prefix), or `random`.", show_default=False),
    ],
    train: TRAINING_SET,
    dev: Annotated[
        Path, typer.Option("--eval", help="Labelled texts that are scored after every epoch.", show_default=False)
    ],
    output: NEW_DIRECTORY,
    labels: Annotated[
        str | None,
        typer.Option(help="A file with one label per line, or a,b,c [default: the training labels, sorted]."),
    ] = None,
    label_column: Annotated[str, typer.Option(help="The column to learn.")] = "label",
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Leave out the rows with this label. Can be given several times."),
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="The split of the training file.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="The split of the evaluation file.")] = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    columns: COLUMNS = None,
    bert_config_file: Annotated[
        Path | None, typer.Option(help="The config [default: bert_config.json beside the checkpoint].")
    ] = None,
    vocab_file: Annotated[
        Path | None, typer.Option(help="The vocabulary [default: vocab.txt beside the checkpoint].")
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Adam's highest learning rate.")] = 5e-5,
    num_train_epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 3,
    train_batch_size: Annotated[int, typer.Option(min=1, help="Texts in one step.")] = 32,
    warmup_proportion: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of the steps in which the learning rate rises.")
    ] = 0.1,
    max_seq_length: Annotated[int, typer.Option(min=3, help="The most tokens of a text.")] = 128,
    do_lower_case: DO_LOWER_CASE = True,
    save_checkpoints_steps: Annotated[
        int, typer.Option(min=1, help="Steps between two checkpoints to resume from.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Decides the order of the texts, dropout and random weights.")] = 0,
    threads: Annotated[
        int,
        typer.Option(
            min=0, help="TensorFlow's threads; with 1, equal seeds give equal bits; with 0, TensorFlow chooses."
        ),
    ] = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """Fine-tune a BERT classifier; after an interruption, the same command resumes the training.

    Example: cascade-lab finetune --init uncased_L-12_H-768_A-12 --train train.tsv --eval dev.tsv --output intent
    """
    from cascade_lab.evalset import EvalSet

    def read(path: Path, split: str | None) -> EvalSet:
        # Another column than `label` stays where it is: a file may have the labels of several stages.
        read_set = EvalSet.read(
            path,
            split=split,
            unlabelled=label_column != "label",
            text_column=text_column,
            columns=read_columns(columns),
            encoding=encoding,
        )
        return read_set.without(leave_out or [], label_column)

    train_set, dev_set = read(train, train_split), read(dev, eval_split)
    names = read_labels(labels) if labels else sorted(set(train_set.column(label_column)))
    with spinner("loading TensorFlow"):
        from cascade_lab.bert.finetune import Flags, Init
        from cascade_lab.bert.finetune import finetune as train_classifier

        start = Init.find(init, bert_config_file=bert_config_file, vocab_file=vocab_file)
    flags = Flags(
        learning_rate=learning_rate,
        num_train_epochs=num_train_epochs,
        train_batch_size=train_batch_size,
        warmup_proportion=warmup_proportion,
        max_seq_length=max_seq_length,
        do_lower_case=do_lower_case,
        save_checkpoints_steps=save_checkpoints_steps,
        seed=seed,
        threads=threads,
    )
    record = train_classifier(
        start,
        train_set,
        dev_set,
        names,
        output,
        label_column=label_column,
        flags=flags,
        overwrite=overwrite,
        progress=shows_progress(),
    )
    best = record["curve"][record["best_epoch"] - 1]
    line(f"{output}: epoch {best['epoch']} of {num_train_epochs}, accuracy {best['dev_accuracy']:.4f} on {dev}")
    next_step("init", "GATE", "INTENT", "EVALSET", "--output", "cascade.toml")
