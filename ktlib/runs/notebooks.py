"""Run a notebook with other parameters, record its results by name, and read them back from a folder of runs."""

import ast
import contextlib
import json
import os
import re
import sys
from pathlib import Path

from ktlib.files import ownership

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SFT = NOTEBOOKS / "05_full_sft.ipynb"
FAILED = "failed.ipynb"
MIME = "application/vnd.ktlib.record+json"
PARTIAL = "partial.ipynb"  # what a run writes to until it ends
REPORT, FAILED_REPORT = "report.html", "failed.html"


def record(**values):
    """Show ``values`` at the end of a cell and store them, unrounded, in the notebook's output.

    Values are what JSON knows: numbers, strings, booleans, None, lists and dicts of them (and 0-d tensors).
    """
    from IPython.display import display

    values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    text = "  ".join(f"{name}={_short(value)}" for name, value in values.items())
    display({MIME: values, "text/plain": text}, raw=True)


def load_runs(folder):
    """One dict per executed notebook under ``folder``, sorted by path: a table of runs.

    ``run`` is the notebook's path below ``folder`` without suffix, ``seconds`` and ``failed`` come from papermill,
    then the parameters that were passed, then everything the notebook recorded (later records win).

    Raises:
        FileNotFoundError: there is no such folder.
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
    """What ``notebooks/recorded/name`` holds, JSON, whatever folder the notebook is run from."""
    return json.loads((NOTEBOOKS / "recorded" / name).read_text(encoding="utf-8"))


def read(path):
    """The notebook in a file; ValueError that names the file if it holds none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, nbformat.ValidationError) as error:
        raise ValueError(f"{path}: not a notebook ({type(error).__name__})") from error


def records(notebook):
    """Everything that an executed notebook (of :func:`read`) recorded, by name."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).get(MIME, {})
    return found


def notebook_parameters(notebook):
    """``{name: (annotation, default)}`` of the cell tagged ``parameters``, ``{}`` if there is none.

    Raises:
        ValueError: the file is no notebook.
    """
    try:  # nbformat takes seconds to import, and a wrong parameter should be refused before
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
    """``given`` with every value converted to the annotated type; ValueError for an unknown name or a wrong type.

    papermill itself only warns about a name that the notebook does not have, and YAML reads ``1e-3`` as a string.
    """
    known = notebook_parameters(notebook)
    if unknown := [str(name) for name in given if name not in known]:
        raise ValueError(f"no parameter named {', '.join(unknown)}; there are: {', '.join(known)}")
    return {name: _convert(name, value, known[name][0]) for name, value in given.items()}


def check_run(notebook, parameters):
    """Refuse a run of the SFT notebook as its first cell would, before a kernel is started.

    Raises:
        ValueError, MemoryError: as :func:`ktlib.training.parameters.check_notebook`.
    """
    if Path(notebook).resolve() == SFT:
        from ktlib.training.parameters import check_notebook

        check_notebook(**{name: default for name, (_, default) in notebook_parameters(notebook).items()} | parameters)


def with_output_dir(notebook, parameters, folder):
    """``parameters``, with ``output_dir`` in the run's folder if the notebook has one and it was not given."""
    if "output_dir" in notebook_parameters(notebook):
        return {"output_dir": str(Path(folder) / "adapter")} | parameters
    return parameters


def refuse_foreign(notebook, folder):
    """ValueError if a run's results in ``folder`` would take the place of files that ktlib did not write."""
    names = (Path(notebook).name, REPORT, FAILED, FAILED_REPORT)
    ownership.refuse_foreign([Path(folder) / name for name in names], "folder", folder)


def run(notebook, folder, parameters=None, *, progress=None, quiet=False):
    """Execute ``notebook`` with ``parameters``; returns ``{"notebook": path, "report": path, "error": None or text}``.

    A run that ends well leaves the executed notebook and ``report.html`` in ``folder``. One that fails leaves
    ``failed.ipynb`` and ``failed.html`` and does not touch the results of an earlier good run. Relative paths among
    the parameters mean what they mean to the caller: the kernel works in the caller's directory. What the cells print
    appears on stdout as they run, unless ``quiet``.

    Raises:
        ValueError, MemoryError: a parameter is wrong (:func:`check_parameters`, :func:`check_run`), or ``folder`` holds
            a file of one of these names that ktlib did not write, or that was changed since; nothing was run.
    """
    notebook, folder = Path(notebook), Path(folder)
    parameters = check_parameters(notebook, parameters or {})
    check_run(notebook, parameters)
    refuse_foreign(notebook, folder)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment, not one of the user's
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take 10 times as long where a core is shared
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # reserves less of a GPU than in fixed pieces
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    _teach_papermill_unions()
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
                config=_encrypted(),
            )
        except PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        except DeadKernelError as failure:
            error = f"DeadKernelError: {failure}"
        except KeyboardInterrupt:
            error = "interrupted"

        done, report = (FAILED, FAILED_REPORT) if error else (notebook.name, REPORT)
        if ownership.foreign([folder / done, folder / report]):  # somebody put them there while the notebook ran
            done, report = (ownership.free_name(folder / name, folder=False).name for name in (done, report))
        _export_html(partial, made / report, title=notebook.stem)
        partial.rename(made / done)
        ownership.publish(made, folder, "folder", replace=True)
    if not error:
        for name in (FAILED, FAILED_REPORT):
            ownership.remove(folder / name)
    return {"notebook": folder / done, "report": folder / report, "error": error}


def _export_html(notebook, report, *, title):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(notebook), resources={"metadata": {"name": title}})
    report.write_text(html, encoding="utf-8")


def _teach_papermill_unions():
    """papermill 2.7 does not see a parameter that is annotated ``str | None``, and says that it was passed an unknown
    one. The pattern with which it reads Python's parameters is a class attribute, its translators are registered."""
    from papermill.translators import PythonTranslator, papermill_translators

    class WithUnions(PythonTranslator):
        PARAMETER_PATTERN = re.compile(PythonTranslator.PARAMETER_PATTERN.pattern.replace(r"\],\s]", r"\],\s|]"))

    papermill_translators.register("python", WithUnions)


def _register_engine():
    """Make papermill's own engine known as "ktlib", with one change: the kernel is idle before it is shut down.

    papermill asks the kernel for its language last, and shuts it down as soon as it has the reply. jupyter_client
    begins a shutdown with an interrupt. It would reach the kernel before that has left the handler that replied, and
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

    class UntilIdle(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, *, stdout_file, start_timeout, config, **_):
            options = {"startup_timeout": start_timeout, "stdout_file": stdout_file, "config": config, "log": logger}
            Client(nb_man, kernel_name=kernel_name, **options).execute()

    papermill_engines.register("ktlib", UntilIdle)


def _encrypted():
    """Settings with which jupyter_client, where it can, encrypts what it says to a kernel: on a machine with several
    users others could read it, and ipykernel warns of that in every run."""
    import zmq
    from jupyter_client.manager import KernelManager
    from traitlets.config import Config

    possible = hasattr(KernelManager, "transport_encryption") and zmq.has("curve")
    return Config({"KernelManager": {"transport_encryption": "auto"}} if possible else {})


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
