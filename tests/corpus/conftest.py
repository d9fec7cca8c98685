"""Prints at the end of a test run how many bad files there were."""

from tests.corpus.harness import COUNT


def pytest_terminal_summary(terminalreporter):
    if COUNT:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(COUNT.items()))
        terminalreporter.write_line(f"corpus of bad inputs: {sum(COUNT.values())} ({kinds})")
