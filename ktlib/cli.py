"""The command ``ktlib``: each subcommand is a function of its name in this module.

Exit codes: 0 success; 1 a finding, a failed run, or a repetition that differs; 2 a wrong argument or unreadable input.
"""

import argparse
import contextlib
import sys
import textwrap
import warnings
from dataclasses import fields
from pathlib import Path

from ktlib.runs import notebooks
from ktlib.training.parameters import Parameters


def main(argv=None):
    """Run the command line ``argv`` (default: ``sys.argv``) and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        with _plain_warnings(arguments.command):
            return arguments.run(arguments)
    except (ValueError, OSError, MemoryError) as error:
        # the text of a system error begins with its number, "[Errno 2] ...", which tells users nothing
        is_file_error = isinstance(error, OSError) and error.filename is not None and error.strerror
        message = f"{error.filename}: {error.strerror.lower()}" if is_file_error else error
        print(f"ktlib {arguments.command}: {message}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _plain_warnings(command):
    """Inside the block, warnings of ktlib are printed as errors are, without a file of ktlib and a line of its code."""
    format_all = warnings.formatwarning

    def format_one(message, category, filename, *line):
        if Path(__file__).parent in Path(filename).parents:
            return f"ktlib {command}: {message}\n"
        return format_all(message, category, filename, *line)

    warnings.formatwarning = format_one
    try:
        yield
    finally:
        warnings.formatwarning = format_all


def _parameters_of_a_run():
    """Help text of ``ktlib sft``: name, default and meaning of each training parameter."""
    lines = ["parameters (default), as NAME=VALUE or lines of the YAML file:"]
    for field in fields(Parameters):
        default = "none" if field.default is None else str(field.default).lower()
        if field.name == "output_dir":
            default = "adapter, in the folder of the run"
        lines += textwrap.wrap(
            f"{field.name} ({default}): {field.metadata['help']}", 100, initial_indent="  ", subsequent_indent="      "
        )
    return "\n".join(lines)


def parser():
    """The argument parser of the command and its subcommands."""
    top = argparse.ArgumentParser(prog="ktlib", description="Fine-tune MoE models with the routed experts on the CPU.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name, run, help_text, **options):
        command = commands.add_parser(name, help=help_text, description=f"{help_text}.", **options)
        command.set_defaults(run=run)
        return command

    add("info", info, "print facts about this processor, and which kernels run on it")

    command = add("audit", audit, "print what is in an adapter and what is wrong with it; exit code 1 on a problem")
    command.add_argument("adapter", type=Path, help="folder of a saved adapter, or a safetensors file")
    command.add_argument("--base", type=Path, help="folder of the base model, to check names and shapes")
    command.add_argument("--trained", action="store_true", help="check that training updated every B")
    command.add_argument("--figure", type=Path, help="write a figure of the findings by layer and component")

    command = add(
        "sft",
        sft,
        "run the SFT notebook and write the executed notebook and a report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_parameters_of_a_run(),
    )
    command.add_argument("params", type=Path, nargs="?", help="YAML file of notebook parameters")
    command.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="set a parameter; overrides the file"
    )
    command.add_argument("--name", help="name of the run, default: the file's name, or sft without a file")
    command.add_argument(
        "--repeat", type=Path, metavar="RUN.ipynb", help="repeat the run of this executed notebook, and compare"
    )
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs, default: runs")
    command.add_argument("--notebook", type=Path, default=notebooks.SFT, help=argparse.SUPPRESS)

    command = add("sweep", sweep, "run a notebook over a grid of parameters, or continue such a sweep")
    command.add_argument("grid", type=Path, help="YAML file with notebook, fixed and grid")
    command.add_argument("--name", help="name of the sweep, default: the file's name")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of all sweeps, default: runs")
    command.add_argument("--dry-run", action="store_true", help="check everything and list the runs")

    command = add("adapter", adapter, "convert an adapter between PEFT's, per-expert and KTransformers' files")
    command.add_argument("source", type=Path, help="folder of the adapter")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument("--base", type=Path, required=True, help="folder of the base model (its config is enough)")
    command.add_argument(
        "--to", default="peft", choices=("peft", "per_expert", "ktransformers"), help="layout to write, default: peft"
    )
    command.add_argument(
        "--lora-b-order",
        choices=("rank_major", "grouped_by_expert"),
        help="with --to peft: order of lora_B's columns, for files that do not record it, as older ones of Unsloth",
    )
    command.add_argument(
        "--lora-a-features",
        choices=("in", "out"),
        help="with --to peft: features of lora_A, for files that do not tell it by shapes or PEFT's version (< 0.19.1)",
    )
    command.add_argument("--allow-nonfinite", action="store_true", help="convert NaN and Inf too, default: refuse them")

    command = add("fuse", fuse, "write a checkpoint with fused experts, which loads without a copy")
    command.add_argument("source", type=Path, help="folder of the checkpoint")
    command.add_argument("out", type=Path, help="folder to write, or to complete after an interruption")
    command.add_argument(
        "--quantise",
        choices=("int8", "int4", "nf4", "mxfp4", "fp8", "keep"),
        help="write the routed experts with 8 or 4 bits a weight, or keep those that the checkpoint has",
    )

    command = add("merge", merge, "write a checkpoint of a base model with an adapter merged into its weights")
    command.add_argument("adapter", type=Path, help="folder of the adapter")
    command.add_argument("out", type=Path, help="folder to write, or to complete after an interruption")
    command.add_argument("--base", type=Path, required=True, help="folder of the base model; may be quantised")
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="of the merged weights, default: that of the base, bf16 if it is quantised. Rounding to bf16 loses some "
        "percent of an ordinary adapter's effect, and nearly all of a very small one's; fp32 loses none",
    )
    command.add_argument(
        "--layout",
        default="base",
        choices=("base", "hub"),
        help="names and shapes of the weights: as in the base's files (default), or one tensor per expert as on the "
        "hub, for a base that `ktlib fuse` wrote",
    )
    return top


def info(arguments):
    """Print ``ktlib.cpu_info()``: facts about the processor, and what it lacks for each instruction set."""
    from ktlib.system.cpu import cpu_info

    facts = cpu_info()
    isas = facts.pop("isas")
    for name, value in facts.items():
        print(f"{name:<8} {value}")
    for name, missing in isas.items():
        print(f"{name:<16} {missing or 'runs here'}")
    return 0


def audit(arguments):
    """Print the audit table of a saved adapter."""
    from ktlib.diagnosis.audit import audit
    from ktlib.files.ownership import new_file, refuse_foreign

    if arguments.figure:
        refuse_foreign([arguments.figure], "--figure", arguments.figure)
    config = None
    if arguments.base:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(arguments.base)
    report = audit(arguments.adapter, config, arguments.trained or None)
    print(report)
    if arguments.figure:
        import matplotlib.figure

        ax = matplotlib.figure.Figure(figsize=(10, 3), layout="constrained").subplots()
        with new_file(arguments.figure, "--figure", replace=True) as file:
            report.plot(ax).figure.savefig(file)
    return 0 if report.clean else 1


def sft(arguments):
    """Run the SFT notebook. The last lines say where the results are, even if the run failed after it saved them."""
    notebook = arguments.notebook
    if not notebook.is_file():
        raise ValueError(f"{notebook.name} not found: the SFT notebook is run from a clone of the repository")
    known = notebooks.notebook_parameters(notebook)
    if arguments.repeat:
        return repeat(arguments, read_pairs(arguments.param, known))
    parameters = (read_yaml(arguments.params) if arguments.params else {}) | read_pairs(arguments.param, known)
    folder = arguments.out / (arguments.name or (arguments.params.stem if arguments.params else "sft"))
    parameters = notebooks.with_output_dir(notebook, parameters, folder)

    executed = notebooks.run(notebook, folder, parameters)
    _print_paths(executed)
    if saved := notebooks.records(notebooks.read(executed.notebook)).get("saved"):
        print(f"{saved:<9} {parameters['output_dir']}")
    return 1 if executed.error else 0


def _print_paths(executed):
    """Print the error, if any, and the paths of an executed notebook and its report."""
    if executed.error:
        print(f"\nFAILED in {executed.error}", file=sys.stderr)
    print(f"\nnotebook  {executed.notebook}\nreport    {executed.report}")


def repeat(arguments, changes):
    """Repeat the run of an executed notebook, and print what differs."""
    from ktlib.runs.repeat import run_again

    if arguments.params:
        raise ValueError(f"--repeat takes its parameters from {arguments.repeat}, got {arguments.params} as well")
    folder = arguments.out / (arguments.name or f"{arguments.repeat.stem}-repeat")
    repetition = run_again(arguments.repeat, arguments.notebook, folder, changes)
    _print_paths(repetition.run)
    for title, lines in (("setting", repetition.circumstances), ("DIFFERS", repetition.results)):
        for line in lines or []:
            print(f"{title:<8}  {line}")
    is_same = repetition.results == []
    if is_same:
        print("same      adapter, bit for bit")
    return 0 if is_same else 1


def sweep(arguments):
    """Run the runs of a sweep that are missing; exit code 1 if a run failed."""
    from ktlib.runs.sweep import plan, run_missing

    given = read_yaml(arguments.grid)
    if unknown := sorted(set(given) - {"notebook", "fixed", "grid"}):
        raise ValueError(f"{arguments.grid}: has {', '.join(unknown)}, needs notebook, grid and (or not) fixed")
    folder = arguments.out / (arguments.name or arguments.grid.stem)
    definition = given.get("notebook", "sft"), folder, given.get("grid"), given.get("fixed")
    if arguments.dry_run:
        print(*plan(*definition), sep="\n")
        return 0
    rows = run_missing(*definition)
    failed = [row["run"] for row in rows if row["failed"]]
    for run in failed:
        print(f"FAILED    {folder / run}.html", file=sys.stderr)
    print(f"runs      {folder}")
    return 1 if failed else 0


def adapter(arguments):
    """Convert an adapter: from any layout to PEFT's, or from PEFT's to another."""
    import ktlib

    if not (arguments.base / "config.json").is_file():
        raise ValueError(f"--base: {arguments.base} has no config.json")
    paths = arguments.source, arguments.out, arguments.base
    if arguments.to == "peft":
        options = {"lora_b_order": arguments.lora_b_order, "lora_a_features": arguments.lora_a_features}
        ktlib.import_adapter(*paths, **options, allow_nonfinite=arguments.allow_nonfinite)
    elif arguments.lora_b_order or arguments.lora_a_features:
        raise ValueError("--lora-b-order, --lora-a-features: need --to peft; export the adapter that --to peft writes")
    else:
        ktlib.export_adapter(*paths, arguments.to, allow_nonfinite=arguments.allow_nonfinite)
    print(f"adapter   {arguments.out}")
    return 0


def fuse(arguments):
    """Write a checkpoint with fused experts, and print the error of quantised ones."""
    import ktlib
    from ktlib.conversion.quantise_checkpoint import REPORT
    from ktlib.files.tensor_files import read_json

    out = ktlib.fuse_checkpoint(arguments.source, arguments.out, quantise=arguments.quantise)
    if arguments.quantise:
        report = read_json(out / REPORT)
        print("error     {mean:.3g} on average, {worst:.3g} in {worst_weight} (relative L2)".format(**report))
        print(f"report    {out / REPORT}")
    print(f"model     {out}")
    return 0


def merge(arguments):
    """Merge an adapter into its base, and print how much of its effect rounding lost."""
    import ktlib
    from ktlib.conversion.merge import REPORT
    from ktlib.files.tensor_files import read_json

    paths = arguments.adapter, arguments.out, arguments.base
    out = ktlib.merge_adapter(*paths, dtype=arguments.dtype, layout=arguments.layout)
    report = read_json(out / REPORT)
    print("lost      {lost:.2%} of the update by rounding, at most {worst:.2%} in {worst_tensor}".format(**report))
    if report["lost"] > 1e-4:
        print("          --dtype fp32 loses none")
    print(f"report    {out / REPORT}")
    print(f"model     {out}")
    return 0


def read_yaml(path):
    """The dict ``{parameter: value}`` in a YAML file; ValueError if the file holds anything else."""
    values = parse_yaml(path.read_bytes(), path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: needs lines of the form `name: value`, has a {type(values).__name__}")
    return values


def parse_yaml(text, source):
    """The value of YAML ``text``; ValueError for invalid YAML, and for keys that are no text or occur twice.

    The error names ``source``, where the text comes from.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # SafeLoader accepts equal keys, and reads the key `no` as False
        def compose_mapping_node(self, anchor):
            node, seen = super().compose_mapping_node(anchor), set()
            for key, _ in node.value:
                is_text = key.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
                if not is_text or key.value in seen:
                    problem = f"{key.value} is given twice" if is_text else "needs text as a name, put it in quotes"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            return node

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None


def read_pairs(pairs, known):
    """``["name=value", ...]`` as a dict. Values stay text where ``known`` annotates the parameter so, others are YAML.

    ``known`` is what :func:`ktlib.runs.notebooks.notebook_parameters` returns.
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--param {pair}: needs NAME=VALUE")
        annotation = known.get(name, ("", None))[0]
        is_text = "str" in annotation and not annotation.startswith(("list", "dict"))
        is_none = "None" in annotation and text in ("", "null", "None")
        values[name] = None if is_none else text if is_text else parse_yaml(text, f"--param {pair}")
    return values


if __name__ == "__main__":
    sys.exit(main())
