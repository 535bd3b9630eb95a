"""nbval: output kinds that are not compared when a notebook is re-run (nbval itself leaves out images)."""

collect_ignore = ["scratch"]


def pytest_collectstart(collector):
    """stderr holds warnings with paths, HTML repeats the text, records hold floats to the last bit."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html", "application/vnd.ktlib.record+json")
