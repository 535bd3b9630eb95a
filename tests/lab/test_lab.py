"""JupyterLab in a browser: notebooks are opened, all cells are run from the menu, and they end without an error."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from ktlib.training.tasks import dates

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WIDGET = "application/vnd.jupyter.widget-view+json"  # here: of a progress bar
QUIET = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "window-size=1400,1200")  # fmt: skip


# A notebook with parameters that make it short; the rest of it is as it is. Both draw a figure, the second has bars.
NOTEBOOKS = {
    "01_environment.ipynb": {},
    "05_full_sft.ipynb": {"dataset": "rows.jsonl", "steps": 12, "output_dir": "adapter"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """URL with token, and folder, of a JupyterLab on copies of the notebooks, started as `make lab` does."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, dates(n_train=100, n_test=1)[0])))
    for name, parameters in NOTEBOOKS.items():
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        nbformat.write(notebook, folder / name)
    line = re.search(r"^lab:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    words = {"$(PY)": sys.executable, "notebooks": str(folder)}
    command = [words.get(word, word) for word in line.split()]
    not_here = (
        "DISPLAY",
        "WAYLAND_DISPLAY",
        "BROWSER",
        "TQDM_DISABLE",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    )  # as `make lab`
    environment = {k: v for k, v in os.environ.items() if k not in not_here}
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment |= {name: str(folder / part) for name, part in own.items()}
    log = open(folder / "log", "w+")
    server = subprocess.Popen([*command, "--allow-root", "--port", "0"], stdout=log, stderr=log, env=environment)
    try:
        yield wait_for(lambda: re.search(r"http://(?:127.0.0.1|localhost):\d+/lab\S*", log_text(log)), 90)[0], folder
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def log_text(log):
    log.seek(0)
    return log.read()


def wait_for(condition, seconds):
    """What ``condition`` returns as soon as that is true; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {condition}")


def test_make_lab_prints_a_url_without_a_display(lab):
    base, _, token = lab[0].partition("lab?token=")
    with urllib.request.urlopen(f"{base}api/contents?token={token}", timeout=20) as answer:
        assert set(NOTEBOOKS) <= {item["name"] for item in json.load(answer)["content"]}


@pytest.fixture
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with chromedriver (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in environment.yml")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in QUIET:
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.compatible("JupyterLab in Chromium")
def test_all_cells_run_from_the_menu(lab, browser, tmp_path):
    def click(text):
        """The menu (entry) of this text; JupyterLab shortens none of them at this width."""
        script = """
            const all = [...document.querySelectorAll('.lm-MenuBar-itemLabel, .lm-Menu-itemLabel')];
            return all.find(one => one.innerText.trim() === arguments[0] && one.offsetParent) || null;"""
        wait_for(lambda: browser.execute_script(script, text), 60).click()

    def shown(selector, test):
        """Of how many elements of the open notebook ``test`` is true, a JavaScript expression in ``one``."""
        script = (
            f"return [...document.querySelectorAll('.jp-OutputArea-output {selector}')].filter(one => {test}).length"
        )
        return browser.execute_script(script)

    def prompts():
        script = "return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(one => one.innerText)"
        return browser.execute_script(script)

    def idle():
        """Whether the status bar says that the kernel has started and waits."""
        return browser.execute_script(
            "return document.querySelector('#jp-main-statusbar').innerText.includes('| Idle')"
        )

    def accept():
        """JupyterLab may ask which kernel to start."""
        browser.execute_script("document.querySelector('.jp-Dialog .jp-mod-accept')?.click()")

    def run_all(name):
        url, path = lab[0].replace("/lab", f"/lab/workspaces/{Path(name).stem}/tree/{name}", 1), lab[1] / name
        browser.get(url)  # a workspace of its own: nothing else is open there
        wait_for(lambda: prompts() and (idle() or accept()), 120)
        click("Run")
        click("Run All Cells")
        wait_for(lambda: re.search(r"[*\d]", "".join(prompts())), 60)
        wait_for(lambda: "*" not in "".join(prompts()) and finished(browser, path), 300)
        outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]
        figures, bars = (sum(kind in output.get("data", {}) for output in outputs) for kind in ("image/png", WIDGET))
        assert figures and (bars or name != "05_full_sft.ipynb")
        wait_for(lambda: shown("img", "one.naturalWidth > 100") == figures, 30)
        wait_for(lambda: shown(".progress-bar", "one.style.width == '100%'") == bars, 30)

    for name in NOTEBOOKS:
        try:
            run_all(name)
        finally:
            browser.save_screenshot(str(tmp_path / f"{name}.png"))


def finished(browser, path):
    """Whether the notebook, saved from the page, has a number at every code cell; AssertionError if one failed."""
    browser.execute_script("document.querySelector('jp-button[data-command=\"docmanager:save\"]').click()")
    try:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    except (FileNotFoundError, ValueError):  # it is being written
        return False
    errors = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, errors[0]["evalue"]
    return bool(code) and all(cell["execution_count"] for cell in code)
