"""The `rnf` command: which subcommand is asked for, and what is said when it can't be done."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_rnf import __version__
from lightning_rnf.runtime import extras

_HELP = """Relevance-based Neural Freezing: keep old tasks while learning new ones.

When a task has been trained, relevance of every unit (neuron or filter) is measured on reference data; a search finds
the cutoff: how many of the least relevant units can be pruned before accuracy falls by a tolerance; what remains is
frozen (elasticity 0), and the next task learns with the free units."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None: those of the process.

    Raises:
        SystemExit: with 2 and a sentence if what was asked for can't be done, or a report fails on a condition; with 1
            if masks differ; with 143 if SIGTERM has ended a fit, which Lightning lets end with 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] and given[0] in _LIGHTNING:
            _with_lightning(given)
        else:
            options = _parser().parse_args(given)
            options.run(options)
    except Exception as error:
        sentence = _sentence(error, given)
        if sentence is None:
            raise
        print(f"rnf: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


_LIGHTNING = {
    "fit": "train one task: LightningCLI with the callback in place, its parameters under the key rnf",
    "validate": "the same for validation data; a finished task is recalled: only its relevant units speak",
    "test": "the same for test data",
    "predict": "the same for predictions",
    "stream": "train task after task from one YAML file, and go on where it was stopped",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnf", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"lightning-rnf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="five tasks of handwritten digits, naive fine-tuning beside relevance freezing; under a minute"
    )
    demo.add_argument("--output", type=Path, default=Path("retention.png"), help="the figure to write (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    demo.set_defaults(run=_demo)

    for name, text in _LIGHTNING.items():  # for the list of commands: they have parsers of their own
        commands.add_parser(name, help=text, add_help=False)

    report = commands.add_parser("report", help="what finished tasks have kept and cost, and what is left")
    report.add_argument("file", type=Path, help="a checkpoint, or a file of masks (.safetensors)")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--markdown", action="store_true", help="for a page of text")
    form.add_argument("--html", type=Path, metavar="PAGE", help="write one page with tables and figures")
    report.add_argument(
        "--config",
        type=Path,
        help="YAML whose key model says which model to build: layers frozen by connections are compared in it alone",
    )
    report.add_argument("--metric", help="of the matrix: one that tests have logged (the first with acc in it)")
    report.add_argument(
        "--fail-on",
        nargs="+",
        action="extend",
        default=[],
        metavar="CONDITION",
        help="for pipelines: exit code 2 if one holds, or can't be told: changed (rows are not bit-equal), drift "
        "(logits are not), criterion (a sub-network falls short of it), accuracy=0.9 (a task's last test is below), "
        "forgetting=0.01 (above), free=0.1 (units, below)",
    )
    report.add_argument("--junit", type=Path, metavar="XML", help="write what --fail-on found for a CI system")
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="cut a finished task's sub-network out, as a small dense module")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--task", required=True, help="name of the finished task")
    export.add_argument("--config", type=Path, required=True, help="YAML whose key model says which model to build")
    export.add_argument("--output", type=Path, help="file for torch.load (TASK.pt)")
    export.set_defaults(run=_export)

    masks = commands.add_parser("masks", help="which units are relevant to which task")
    verbs = masks.add_subparsers(dest="verb", required=True, metavar="show|diff")
    show = verbs.add_parser("show", help="relevant and free units of each layer")
    show.add_argument("file", type=Path, help="a checkpoint, or a file of masks (.safetensors)")
    show.add_argument("--task", help="of one task (of all)")
    show.set_defaults(run=_show)
    diff = verbs.add_parser("diff", help="where two files keep different units; exit code 1 if they do")
    diff.add_argument("one", type=Path, help="a checkpoint, or a file of masks (.safetensors)")
    diff.add_argument("other", type=Path)
    diff.add_argument("--task", help="of one task (of all)")
    diff.set_defaults(run=_diff)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from lightning_rnf.commands.demo import run

    run(options.output, options.seed)


def _with_lightning(arguments: Sequence[str]) -> None:
    from lightning_rnf.commands.lightning_cli import CommandLine, run_stream
    from lightning_rnf.packages import SIGTERMException, either

    try:
        if arguments[0] == "stream":
            run_stream(arguments[1:])
        else:
            # Lightning warns of arguments that are not the process's own.
            CommandLine(None if arguments == sys.argv[1:] else arguments)
    except either(SIGTERMException):
        raise SystemExit(128 + signal.SIGTERM) from None  # what a shell says of a program without a handler


def _state(path: Path) -> Any:
    return _read(path)[0]


def _read(path: Path) -> tuple[Any, Any]:
    """The finished tasks in a file, and the checkpoint that it is; None: it is a file of masks."""
    from lightning_rnf.memory import maskfiles
    from lightning_rnf.tasks import checkpoints

    if path.suffix == maskfiles.SUFFIX:
        return maskfiles.load(path), None
    checkpoint = checkpoints.read(path)
    return checkpoints.finished_tasks(checkpoint), checkpoint


def _report(options: argparse.Namespace) -> None:
    from lightning_rnf.report import RetentionReport, failing, junit, verdicts
    from lightning_rnf.tasks import checkpoints

    if options.junit and not options.fail_on:
        raise ValueError("--junit writes what --fail-on has found: name a condition, as in --fail-on changed free=0.1")
    state, checkpoint = _read(options.file)
    if options.config is not None and checkpoint is None:
        raise ValueError(f"--config is of use for a checkpoint: {options.file} has no weights that a model could have")
    model = None if options.config is None else _model_of(checkpoint, options.config)
    audit = None if checkpoint is None else checkpoints.audit_of(checkpoint, state, model)
    report = RetentionReport.of(state, metric=options.metric, audit=audit)
    found = verdicts(report, options.fail_on)
    if options.html:
        options.html.write_text(report.to_html(), encoding="utf-8")
    else:
        print(report.to_json() if options.json else report.to_markdown() if options.markdown else report)
    if options.junit:
        options.junit.write_text(junit(found, f"rnf report {options.file.name}"), encoding="utf-8")
    if broken := failing(found):
        if audit is not None and model is None and any(audit.unknown.values()) and "changed" in options.fail_on:
            broken.append("--config FILE, which says how to build the model, tells whether those have changed")
        of_tests = [one.said for one in found if one.fails and one.condition.startswith(("accuracy", "forgetting"))]
        if checkpoint is not None and any("not " in said for said in of_tests):
            broken.append(
                "a checkpoint is written before its task is tested: a file of rnf.save(FILE) after the tests has them"
            )
        print("\n".join(f"rnf: {sentence}" for sentence in broken), file=sys.stderr)
        raise SystemExit(2)


def _export(options: argparse.Namespace) -> None:
    import torch

    from lightning_rnf.callback import RelevanceFreezing
    from lightning_rnf.commands.lightning_cli import activate_head
    from lightning_rnf.tasks import checkpoints

    output = options.output or Path(f"{options.task}.pt")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(output.parent)!r} to write {output.name} to")
    checkpoint = checkpoints.read(options.checkpoint)
    rnf = RelevanceFreezing()
    rnf.state = checkpoints.finished_tasks(checkpoint)
    record = rnf.state.task(options.task)
    model = _model_of(checkpoint, options.config)
    activate_head(model, record.head)
    small: Any = rnf.export(model, options.task)
    torch.save(small, output)
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (small, model)]
    print(f"{output}: {numbers[0]:,} of {numbers[1]:,} parameters; torch.load(path, weights_only=False) needs no class")
    for reason, units in small.kept["reasons"].items():
        print(f"  {units} silent units stay: {reason}")


def _model_of(checkpoint: Any, config: Path) -> Any:
    """The model that a file of settings says how to build, with a checkpoint's weights."""
    from lightning_rnf.commands.lightning_cli import built_model
    from lightning_rnf.tasks import checkpoints

    model = built_model(config)
    checkpoints.widen_to(checkpoint, model)
    checkpoints.check(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def _show(options: argparse.Namespace) -> None:
    from lightning_rnf.memory import masks

    state = _state(options.file)
    print(masks.as_text(masks.layers_table(state, options.task)) or "no finished task")
    if rows := masks.tokens_table(state):
        print("\n" + masks.as_text(rows))


def _diff(options: argparse.Namespace) -> None:
    from lightning_rnf.memory import masks

    rows = masks.difference(_state(options.one), _state(options.other), options.task)
    if rows:
        print(masks.as_text(rows))
        raise SystemExit(1)


def _sentence(error: Exception, arguments: Sequence[str]) -> str | None:
    """What to say of an error that is the user's to mend; None: it may be one of the code's, to be seen in full."""
    if missing := extras.sentence(error):
        return missing
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str | os.PathLike):
        path = os.fspath(error.filename)
        if any(argument == path or argument.endswith(f"={path}") for argument in arguments):
            return f"{path}: {error.strerror}"
    expected: tuple[type[Exception], ...] = (ValueError, TypeError, KeyError, RuntimeError, OSError)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    is_ours = isinstance(error, expected) and raised_in.partition(".")[0] == "lightning_rnf"
    names = {kind.__name__ for kind in type(error).__mro__}
    if not is_ours and not names & {"ArgumentError", "MisconfigurationException"}:
        return None
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(said).split())
