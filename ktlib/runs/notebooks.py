"""Run a notebook with other parameters, record its results by name, and read them back from a folder of runs."""

import ast
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ktlib.files import ownership

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SFT = NOTEBOOKS / "05_full_sft.ipynb"
FAILED = "failed.ipynb"
MIME = "application/vnd.ktlib.record+json"
PARTIAL = "partial.ipynb"  # the notebook of a run that has not ended
REPORT, FAILED_REPORT = "report.html", "failed.html"


class Executed(NamedTuple):
    """An executed notebook: its path, its HTML report, and the error that ended it (None for a good run)."""

    notebook: Path
    report: Path
    error: str | None


def record(**values):
    """Show ``values`` as output of a notebook's cell, and store them there unrounded.

    Values are those of JSON: numbers, strings, booleans, None, lists and dicts of them; also 0-d tensors.
    """
    from IPython.display import display

    values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    text = "  ".join(f"{name}={_short(value)}" for name, value in values.items())
    display({MIME: values, "text/plain": text}, raw=True)


def load_runs(folder):
    """A table of runs: one dict per executed notebook under ``folder``, sorted by path.

    Its keys are ``run`` (the notebook's path below ``folder``, without suffix), ``seconds`` and ``failed`` (both from
    papermill), the parameters that were passed, and all that the notebook recorded. If a name occurs twice, the value
    that comes last in this order counts.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a file is no notebook.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder}")
    rows = []
    for path in sorted(Path(folder).glob("**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts or path.name == PARTIAL:
            continue
        notebook = read(path)
        papermill = notebook.metadata.get("papermill", {})
        row = {"run": path.relative_to(folder).with_suffix("").as_posix()}
        row |= {"seconds": papermill.get("duration"), "failed": bool(papermill.get("exception")) or path.name == FAILED}
        row |= papermill.get("parameters", {})
        rows.append(row | records(notebook))
    return rows


def read_recorded(name):
    """The JSON in ``notebooks/recorded/name``, independent of the folder that the notebook runs in."""
    return json.loads((NOTEBOOKS / "recorded" / name).read_text(encoding="utf-8"))


def read(path):
    """The notebook in a file; ValueError if the file holds no notebook."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, nbformat.ValidationError) as error:
        raise ValueError(f"{path}: not a notebook ({type(error).__name__})") from error


def records(notebook):
    """``{name: value}`` of all that an executed notebook (of :func:`read`) recorded with :func:`record`."""
    values = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            values |= output.get("data", {}).get(MIME, {})
    return values


def notebook_parameters(notebook):
    """``{name: (annotation, default)}`` of the cell tagged ``parameters``, ``{}`` without such a cell.

    Raises:
        ValueError: the file is no notebook.
    """
    try:  # read as JSON: nbformat takes seconds to import, and wrong parameters should be refused at once
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{notebook}: not a notebook ({type(error).__name__})") from error
    return {
        node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value))
        for source in sources[:1]
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign)
    }


def check_parameters(notebook, given):
    """``given`` with every value converted to its annotated type; ValueError for an unknown name or a wrong type.

    This is needed because papermill only warns about unknown names, and YAML reads ``1e-3`` as a string.
    """
    known = notebook_parameters(notebook)
    if unknown := [str(name) for name in given if name not in known]:
        raise ValueError(f"no parameter named {', '.join(unknown)}; there are: {', '.join(known)}")
    return {name: _convert(name, value, known[name][0]) for name, value in given.items()}


def check_run(notebook, parameters):
    """Check a run of the SFT notebook as the notebook's first cell does, but before a kernel is started.

    Raises:
        ValueError, MemoryError: as :func:`ktlib.training.parameters.check_notebook`.
    """
    if Path(notebook).resolve() == SFT:
        from ktlib.training.parameters import check_notebook

        check_notebook(**{name: default for name, (_, default) in notebook_parameters(notebook).items()} | parameters)


def with_output_dir(notebook, parameters, folder):
    """``parameters``, with an ``output_dir`` in the run's folder if the notebook has one and none is given."""
    if "output_dir" in notebook_parameters(notebook):
        return {"output_dir": str(Path(folder) / "adapter")} | parameters
    return parameters


def refuse_foreign(notebook, folder):
    """Raise a ValueError if a run's results would replace files in ``folder`` that ktlib did not write."""
    names = (Path(notebook).name, REPORT, FAILED, FAILED_REPORT)
    ownership.refuse_foreign([Path(folder) / name for name in names], "folder", folder)


def run(notebook, folder, parameters=None, *, progress=None, quiet=False):
    """Execute ``notebook`` with ``parameters``; returns an :class:`Executed`.

    A good run writes the executed notebook and ``report.html`` to ``folder``. A failed run writes ``failed.ipynb`` and
    ``failed.html``, and leaves the results of an earlier good run unchanged. The kernel works in the caller's
    directory, to which relative paths among the parameters refer. The output of cells appears on stdout as they run,
    unless ``quiet``.

    Raises:
        ValueError, MemoryError: a parameter is wrong (:func:`check_parameters`, :func:`check_run`), or a file in
            ``folder`` has the name of a result but was not written by ktlib, or was changed; nothing was executed.
    """
    notebook, folder = Path(notebook), Path(folder)
    parameters = check_parameters(notebook, parameters or {})
    check_run(notebook, parameters)
    refuse_foreign(notebook, folder)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not the user's
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take 10 times as long where a core is shared
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # reserves less GPU memory than segments of fixed size
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    _register_translator()
    _register_engine()
    folder.mkdir(parents=True, exist_ok=True)
    error = None
    with ownership.temporary_folder(folder) as made:
        partial = made / PARTIAL
        try:
            papermill.execute_notebook(
                notebook,
                partial,
                parameters,
                engine_name="ktlib",
                kernel_name="python3",
                progress_bar=sys.stderr.isatty() if progress is None else progress,
                stdout_file=None if quiet else sys.stdout,
                config=_kernel_config(),
            )
        except PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        except DeadKernelError as failure:
            error = f"DeadKernelError: {failure}"
        except KeyboardInterrupt:
            error = "interrupted"

        executed, report = (FAILED, FAILED_REPORT) if error else (notebook.name, REPORT)
        if ownership.foreign([folder / executed, folder / report]):  # they appeared while the notebook ran
            executed, report = (ownership.free_name(folder / name, folder=False).name for name in (executed, report))
        _export_html(partial, made / report, title=notebook.stem)
        partial.rename(made / executed)
        ownership.publish(made, folder, "folder", replace=True)
    if not error:
        for name in (FAILED, FAILED_REPORT):
            ownership.remove(folder / name)
    return Executed(folder / executed, folder / report, error)


def _export_html(notebook, report, *, title):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(notebook), resources={"metadata": {"name": title}})
    report.write_text(html, encoding="utf-8")


def _register_translator():
    """Make papermill recognise parameters with annotations such as ``str | None``.

    papermill 2.7 does not, and reports such parameters as unknown. It reads parameters with a regular expression, a
    class attribute of its translator.
    """
    from papermill.translators import PythonTranslator, papermill_translators

    class WithUnions(PythonTranslator):
        PARAMETER_PATTERN = re.compile(PythonTranslator.PARAMETER_PATTERN.pattern.replace(r"\],\s]", r"\],\s|]"))

    papermill_translators.register("python", WithUnions)


def _register_engine():
    """Register "ktlib", papermill's engine with one change: it waits until the kernel is idle before the shutdown.

    papermill's last request asks the kernel for its language. As soon as the reply arrives, papermill shuts the kernel
    down, which jupyter_client begins with an interrupt. If the kernel were still in the handler of that request,
    ipykernel would print an error.
    """
    from queue import Empty

    from jupyter_core.utils import run_sync
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines
    from papermill.log import logger

    class Client(PapermillNotebookClient):
        def wait_for_reply(self, msg_id, cell=None):
            reply, status = super().wait_for_reply(msg_id, cell), {}
            with contextlib.suppress(Empty):
                while status.get("execution_state") != "idle":
                    message = run_sync(self.kc.get_iopub_msg)(timeout=self.iopub_timeout)
                    status = message["content"] if message["parent_header"].get("msg_id") == msg_id else {}
            return reply

    class WaitingEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, *, stdout_file, start_timeout, config, **_):
            options = {"startup_timeout": start_timeout, "stdout_file": stdout_file, "config": config, "log": logger}
            Client(nb_man, kernel_name=kernel_name, **options).execute()

    papermill_engines.register("ktlib", WaitingEngine)


def _kernel_config():
    """Settings for jupyter_client: messages to the kernel are encrypted, if the installed versions can do that.

    Otherwise other users of the machine could read them, and ipykernel warns of that in every run.
    """
    import zmq
    from jupyter_client.manager import KernelManager
    from traitlets.config import Config

    can_encrypt = hasattr(KernelManager, "transport_encryption") and zmq.has("curve")
    return Config({"KernelManager": {"transport_encryption": "auto"}} if can_encrypt else {})


def _convert(name, value, annotation):
    kinds = [kind.split("[")[0].strip() for kind in annotation.split("|")]
    kind = type(value).__name__
    if value is None and "None" in kinds or kind in kinds:
        return value
    if "float" in kinds and kind in ("int", "str"):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name}: got {value!r} ({kind}), needs {annotation}")


def _short(value, most=300):
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= most else text[:most] + "..."
