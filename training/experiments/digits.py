"""All experiments on the digits models, in one go, and their tables as Markdown.

    python -m training.experiments.digits --one-step FOLDER --mrar FOLDER --data data/digits --output results \
        --models p4=FOLDER scales=FOLDER

`--models` joins further ones to the two in the comparisons of models: other sequence lengths, scale-level AR.
An experiment whose result is there is not run again. Writes a folder for each and results.md with tables and pictures.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training import evaluate
from training.experiments import ar_steps, diversity, fewer_tokens, fusion, sequence_length, variations
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines.files import home_path, new_file


Main = Callable[[Sequence[str] | None], None]

# folder: title, program, model, the files that show that it is finished, its own options; in the order of cost
EXPERIMENTS: dict[str, tuple[str, Main, str, list[str], list[str]]] = {
    "fusion": ("Class fusion, 1-step", fusion.main, "one_step", ["fusion", "fusion_strip"], ["--rows", "3"]),
    "diversity": ("Semantic diversity", diversity.main, "", ["diversity"], []),
    "sequence_length": ("Images in a sequence", sequence_length.main, "", ["sequence_length"], []),
    "ar_steps": ("Quality against AR steps", ar_steps.main, "mrar", ["ar_steps"], []),
    "fewer_tokens": ("The first k condition tokens", fewer_tokens.main, "one_step", ["fewer_tokens"], []),
    "variations": ("Variations of real images", variations.main, "mrar", ["variations"], []),
    "fusion_mrar": ("Class fusion, MRAR", fusion.main, "mrar", ["fusion", "fusion_strip"], ["--rows", "3"]),
    "sampler": ("Drift and diffusion scale", evaluate.main, "one_step", ["search"], []),
}
SEARCH = ("drift_scale=0.9,1.0,1.1", "diffusion_scale=1.0,1.15,1.3,1.45")
COMPARED = ("diversity", "sequence_length")
JUDGED = (*COMPARED, "ar_steps", "fewer_tokens", "variations")


def command_line(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of one experiment."""
    model, extra = EXPERIMENTS[name][2], EXPERIMENTS[name][4]
    line = ["--output", str(options.output / name), "--num-inference-steps", str(options.num_inference_steps), *extra]
    if model:
        line += ["--model", str(getattr(options, model))]
    if name in JUDGED:
        line += ["--digits", str(options.data), "--num-images", str(options.num_images)]
    if name in COMPARED:
        line += ["--models", f"1-step={options.one_step}", f"MRAR={options.mrar}", *options.models]
    if name.startswith("fusion"):
        line += ["--classes", *options.classes, "--digits", str(options.data)]
    if name == "sampler":
        line += ["--num-images", str(options.num_images), "--batch-size", "250", "--extractor", "pixels"]
        line += ["--reference", f"{options.data}/test", "--reference-cache", str(options.output / "cache")]
        line += [option for axis in SEARCH for option in ("--search", axis)]
    return line


def table(rows: list[dict[str, Any]]) -> str:
    """Numbers of JSON rows as a Markdown table; what only one row has is left out of the others."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def section(name: str, folder: Path) -> str:
    """Title, table and pictures of a finished experiment."""
    title, _, _, files, _ = EXPERIMENTS[name]
    result = json.loads((folder / name / f"{files[0]}.json").read_text())
    rows = result.get("rows") or [row["sampling"] | row["metrics"] for row in result.get("results", [])]
    pictures = [f"![{title}]({name}/{file}.png)" for file in files]
    return "\n\n".join([f"## {title}", *([table(rows)] if rows else []), *pictures])


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-step", required=True, help="folder of the 1-step digits model")
    parser.add_argument("--mrar", required=True, help="folder of the MRAR digits model")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="more models to compare")
    parser.add_argument("--data", type=home_path, required=True, help="folder written by training.digits.export")
    parser.add_argument("--output", type=home_path, required=True)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--classes", nargs="+", default=["0", "1", "3", "6"], help="of the fusion")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--num-inference-steps", type=int, default=25)
    options = parser.parse_args(arguments)
    for name in options.only:
        if not all((options.output / name / f"{file}.png").exists() for file in EXPERIMENTS[name][3]):
            EXPERIMENTS[name][1](command_line(name, options))
    finished = [name for name in EXPERIMENTS if (options.output / name / f"{EXPERIMENTS[name][3][0]}.json").exists()]
    with new_file(options.output / "results.md") as temporary:
        temporary.write_text("\n\n".join(section(name, options.output) for name in finished) + "\n")


if __name__ == "__main__":
    main()
