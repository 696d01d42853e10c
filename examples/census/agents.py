"""The three kinds of agents of the census: one splits, many analyse, one adds up.

Nothing here knows of nodes, crashes or retries. The splitter walks the tree in
steps, telling itself to go on; each analyser reads one file per signal; the
aggregator keeps the totals and, for the proof, how often each file came.
"""

from __future__ import annotations

from pydantic import Field

from examples.census.census import Census, FileReport, analyse_file, find_files
from foundation_nats import Agent, Payload, Signal, State, on

STEP = 100


class Split(Payload, type="census.split"):
    """Hand out the files of *root* from number *offset* on."""

    root: str
    offset: int = 0
    analysers: int


class Analyse(Payload, type="census.analyse"):
    """Look into one file."""

    root: str
    path: str


class Splitter(Agent):
    """Splits the tree into files, a step at a time."""

    class State(State):
        handed_out: int = 0

    @on(Split)
    def split(self, signal: Signal[Split]) -> None:
        order = signal.data
        files = find_files(order.root)
        step = files[order.offset : order.offset + STEP]
        for number, path in enumerate(step, order.offset):
            self.emit(
                Analyse(root=order.root, path=path), to=f"analyser-{number % order.analysers}"
            )
        self.state.handed_out += len(step)
        if order.offset + STEP < len(files):
            self.emit(order.model_copy(update={"offset": order.offset + STEP}), to=self.id)


class Analyser(Agent):
    """Parses one file per signal."""

    class State(State):
        files: int = 0

    @on(Analyse)
    def analyse(self, signal: Signal[Analyse]) -> None:
        report = analyse_file(signal.data.root, signal.data.path)
        self.state.files += 1
        self.emit(report, to="aggregator")


class Aggregator(Agent):
    """Keeps the totals per package, and counts how often each file was reported."""

    class State(State):
        census: Census = Census()
        reports: dict[str, int] = Field(default_factory=dict)

    @on(FileReport)
    def report(self, signal: Signal[FileReport]) -> None:
        self.state.census.add(signal.data)
        path = signal.data.path
        self.state.reports[path] = self.state.reports.get(path, 0) + 1

    @on("census.progress")
    def progress(self, signal: Signal) -> int:
        return sum(self.state.reports.values())
