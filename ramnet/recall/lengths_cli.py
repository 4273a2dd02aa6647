"""``ramnet recall-lengths``: recall at lengths that a model was not trained on."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--pairs", type=click.IntRange(min=1), default=8, help="Key-value pairs to remember at every length.")
@click.option("--output", type=click.Path(path_type=Path), default="runs/recall-lengths", help="Folder of results.")
@click.option("--kernels", default="cpu", help="Kernels of the memory ops: cpu (tuned, TVM) or reference.")
def recall_lengths(checkpoints: tuple[Path, ...], pairs: int, output: Path, kernels: str) -> None:
    """Measure a recall model's accuracy at 64 to 65 536 tokens, with the same number of pairs.

    CHECKPOINT is what `ramnet train mqar` wrote, or the folder of `ramnet recall`, for all RAM-Nets that it has trained
    to the end, at each scale the first seed at the best learning rate.
    """
    from ramnet import ops
    from ramnet.console import console
    from ramnet.model import RamNetForCausalLM
    from ramnet.recall import lengths
    from ramnet.training.model import state_size
    from ramnet.training.mqar import Mqar
    from ramnet.training.sweep_cli import check

    check(output, kernels, lengths.TABLE, lengths.DATA, lengths.PICTURE)
    screen = console()
    folders = list(dict.fromkeys(folder for given in checkpoints for folder in lengths.folders(given)))
    models = [RamNetForCausalLM.from_pretrained(folder) for folder in folders]
    for model in models:
        Mqar(pairs, lengths.LENGTHS[-1], model.config.vocab_size)  # raises what is wrong before anything is measured
    trained = [lengths.trained(folder) for folder in folders]
    found = []
    with ops.using(kernels):
        names = lengths.names(models, folders)
        for name, folder, model, longest in zip(names, folders, models, trained, strict=True):
            accuracies = []
            for each in lengths.measure(model, pairs):
                screen.print(
                    f"{name}: accuracy {each.all:.3f} at {each.length} tokens,"
                    f" {lengths.shown(each.late)} in their second half",
                    soft_wrap=True,
                )
                accuracies.append(each)
            found.append(lengths.Measured(name, str(folder), state_size(model.config, 0), longest, accuracies))
    for path in lengths.save(found, pairs, output):
        click.echo(str(path))
