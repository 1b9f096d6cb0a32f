"""Commands that make checkpoints: `finetune`, `vocabulary`, `import-hf`, `export`, `study`."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import figure, line, table, tensorflow
from cascade_lab.errors import TrainingError


class Kind(str, Enum):
    """What `export` writes."""

    saved_model = "saved_model"
    hf = "hf"


DataFile = Annotated[Path, typer.Option(help="Labelled texts, of any kind that `run` takes.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]


def finetune(
    init: Annotated[
        str,
        typer.Option(help="A BERT checkpoint to start from (directory or prefix), or `random`.", show_default=False),
    ],
    train: DataFile,
    dev: Annotated[Path, typer.Option("--eval", help="Labelled texts, scored after every epoch.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The directory to make.", show_default=False)],
    labels: Annotated[
        str | None,
        typer.Option(help="A file of one label a line, or a,b,c [default: the training labels, sorted]."),
    ] = None,
    label_column: Annotated[str, typer.Option(help="The column that is learned.")] = "label",
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Leave out the rows with this label (may be given again).")
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="The split of the training file.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="The split of the evaluation file.")] = None,
    bert_config_file: Annotated[
        Path | None, typer.Option(help="The config [default: bert_config.json beside the checkpoint].")
    ] = None,
    vocab_file: Annotated[
        Path | None, typer.Option(help="The vocabulary [default: vocab.txt beside the checkpoint].")
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Adam's learning rate at its peak.")] = 5e-5,
    num_train_epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 3,
    train_batch_size: Annotated[int, typer.Option(min=1, help="Texts in one step.")] = 32,
    warmup_proportion: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of the steps over which the rate rises.")
    ] = 0.1,
    max_seq_length: Annotated[int, typer.Option(min=3, help="The most tokens of a text.")] = 128,
    do_lower_case: Annotated[bool, typer.Option(help="Lower the case, for uncased models.")] = True,
    save_checkpoints_steps: Annotated[int, typer.Option(min=1, help="Steps between two points to resume from.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides order, dropout and random weights.")] = 0,
    threads: Annotated[
        int, typer.Option(min=0, help="TensorFlow's threads; 1 makes equal seeds give equal bits; 0 is its choice.")
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a BERT classifier; interrupted, the same command goes on where it was.

    Example: cascade-lab finetune --init uncased_L-12_H-768_A-12 --train train.tsv --eval dev.tsv --output intent
    """
    from cascade_lab.evalset import EvalSet

    learn = EvalSet.read(train, split=train_split).without(leave_out or [], label_column)
    judge = EvalSet.read(dev, split=eval_split).without(leave_out or [], label_column)
    names = _names(labels) if labels else sorted(set(learn.column(label_column)))
    with tensorflow("loading TensorFlow"):
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
        learn,
        judge,
        names,
        output,
        label_column=label_column,
        flags=flags,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    best = record["curve"][record["best_epoch"] - 1]
    line(f"{output}: epoch {best['epoch']} of {num_train_epochs}, accuracy {best['dev_accuracy']:.4f} on {dev}")


def vocabulary(
    train: DataFile,
    output: Annotated[Path, typer.Option(help="The vocab.txt to write.", show_default=False)],
    size: Annotated[int, typer.Option(min=100, help="The most tokens.")] = 8000,
    split: Annotated[str | None, typer.Option(help="The split of the file.")] = None,
    do_lower_case: Annotated[bool, typer.Option(help="Lower the case of the texts.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Make a WordPiece vocabulary of the texts in a file.

    Example: cascade-lab vocabulary --train train.tsv --size 4000 --output vocab.txt
    """
    from cascade_lab.bert.vocabulary import train_vocabulary
    from cascade_lab.evalset import EvalSet

    texts = EvalSet.read(train, split=split).examples["text"].tolist()
    if output.exists() and not overwrite:
        raise TrainingError(f"{output} exists already; choose another output, or ask to overwrite it")
    tokens = train_vocabulary(texts, size=size, do_lower_case=do_lower_case)
    try:
        output.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{output}: cannot be written ({error.strerror}); choose another place") from error
    line(f"{output}: {len(tokens)} tokens of {len(texts)} texts")


def _names(labels: str) -> list[str]:
    """Take labels from a file of one a line, or from a list with commas."""
    if "," in labels:
        return labels.split(",")
    try:
        return Path(labels).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{labels}: cannot be read ({error}); give a file of one label a line, or a,b,c") from error


def import_hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The directory to make.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Turn a Hugging Face BERT directory into a TensorFlow 1 checkpoint; PyTorch is not needed.

    Example: cascade-lab import-hf downloads/my-classifier --output intent
    """
    from cascade_lab.wholly import check_directory

    check_directory(output, overwrite=overwrite, sign="import.json", what="converted checkpoint")
    with tensorflow("importing"):
        from cascade_lab.bert.huggingface import import_directory

        import_directory(source, output, overwrite=overwrite)
    origin = json.loads((output / "import.json").read_text(encoding="utf-8"))
    case = {True: "lower-cased", False: "as they are", None: "not said"}[origin["do_lower_case"]]
    line(f"{output}: {origin['architecture']}, activation {origin['hidden_act']}, texts {case}")


def export(
    cascade: Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The directory to make.", show_default=False)],
    kind: Annotated[
        Kind, typer.Option("--format", help="A SavedModel for TensorFlow Serving, or a Hugging Face directory.")
    ] = Kind.saved_model,
    overwrite: Overwrite = False,
) -> None:
    """Write each stage of a cascade for use elsewhere.

    Example: cascade-lab export cascade.toml --format hf --output exported
    """
    from cascade_lab.spec import CascadeSpec
    from cascade_lab.wholly import check_directory

    spec = CascadeSpec.read(cascade)
    check_directory(output, overwrite=overwrite, sign="export.json", what="cascade's export")
    with tensorflow(f"exporting {len(spec.stages)} stages"):
        from cascade_lab.export import export_cascade

        export_cascade(spec, output, format=kind.value, overwrite=overwrite)
    line(f"{output}: {', '.join(stage.name for stage in spec.stages)}")


def study(
    recipe: Annotated[Path, typer.Argument(metavar="STUDY", help="A study's TOML.", show_default=False)],
    data: Annotated[Path, typer.Option(help="The folder with the data files.", show_default=False)],
    init: Annotated[str, typer.Option(help="The checkpoint that every model starts from.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Gets models, runs and results.json.", show_default=False)],
) -> None:
    """Fine-tune the models of a study, put them together as cascades, and compare them in one table.

    Example: cascade-lab study data/clinc150/study.toml --data clinc150 --init minilm --output runs/study
    """
    with tensorflow("loading TensorFlow"):
        from cascade_lab.study import run_study
    results = run_study(recipe, data=data, init=init, output=output, progress=sys.stderr.isatty())
    shown = table("scheme", "seed", "in scope", "reject recall", "paper: in scope", "reject recall")
    for row in results["rows"]:
        paper = row["paper"] or {}
        said = [
            figure(side.get(key), 3) for side in (row["test"], paper) for key in ("in_scope_accuracy", "reject_recall")
        ]
        shown.add_row(Text(row["scheme"]), str(row["seed"]), *said)
    Console().print(shown)
    line(f"results: {output / 'results.json'}")
