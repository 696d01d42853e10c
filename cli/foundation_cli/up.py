"""`foundation up`: an embedded server, some nodes and a deployment, in one command.

Ctrl-C, SIGTERM and SIGHUP end it with exit code 0 and leave nothing behind: the
nodes are stopped at once (to drain is pointless when everything goes down),
then the server, then the runtime file and, without ``--store``, the data. If
it is killed, the kernel kills the nodes and the server with it.

A node that dies is reported and left to the cluster, which starts its agents
elsewhere; ``--respawn`` starts it again under a new incarnation. With ``--reload``
the agents go on under changed code (`reload.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render, runtime, values
from foundation_cli.connection import (
    DEFAULT_CLUSTER,
    Output,
    Shared,
    connected,
    resolve,
    run,
    with_shared,
)
from foundation_cli.runtime import UpFile

if TYPE_CHECKING:
    import asyncio

    from foundation_nats.api.cluster import Cluster
    from foundation_nats.node.embedded import EmbeddedServer

PREFERRED_PORT = 4222
READY_TIMEOUT_S = 30.0
_STOP_AGAIN_AFTER_S = 0.15
_STOP_TIMEOUT_S = 5.0
_RESPAWN_AFTER_S = 1.0
_SIGNALS_LIMIT = "FOUNDATION_MAILBOX__SIGNALS_MAX_BYTES"
_SERVER_LOOK_EVERY_S = 0.5

# Settings of the caller's own connection that must not reach our nodes.
_FOREIGN = (
    "FOUNDATION_SERVER",
    "FOUNDATION_BUS__SERVERS",
    "FOUNDATION_CREDS",
    "FOUNDATION_BUS__CREDS",
    "FOUNDATION_USER",
    "FOUNDATION_BUS__USER",
    "FOUNDATION_PASSWORD",
    "FOUNDATION_BUS__PASSWORD",
    "FOUNDATION_TOKEN",
    "FOUNDATION_BUS__TOKEN",
    "NATS_CONTEXT",
)


class Durability(StrEnum):
    """What acknowledged writes survive: always the server's death, and of a power cut …"""

    PROCESS = "process"
    INTERVAL = "interval"
    ALWAYS = "always"


_SYNC_INTERVAL = {
    Durability.PROCESS: "2m",
    Durability.INTERVAL: "100ms",
    Durability.ALWAYS: "always",
}


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` shall start."""

    cluster: str
    nodes: int
    workers: int
    store: Path | None
    port: int | None
    imports: tuple[str, ...]
    durability: Durability
    manifest: Path | None
    wait_s: float
    respawn: bool
    log_level: str
    reload: bool = False
    metrics: int | None = None
    """The port of the first node's metrics."""
    watch: tuple[Path, ...] = ()
    """Folders to watch instead of those of the manifest and its modules."""


@dataclass(slots=True)
class NodeProcess:
    """One node: its process now, and how often it was started."""

    name: str
    log: Path
    process: asyncio.subprocess.Process
    starts: int = 1


@dataclass(slots=True)
class _State:
    """What has been started, and so must be stopped."""

    url: str = ""
    store: str = ""
    logs: Path | None = None
    nodes: dict[str, NodeProcess] = field(default_factory=dict)
    watchers: list[asyncio.Task[None]] = field(default_factory=list)
    file: UpFile | None = None
    ready: bool = False
    stopping: bool = False
    keep_logs: bool = False
    deployed: bool = False
    """The manifest, as it was last, is applied."""


class Up:
    """Everything one `foundation up` has started."""

    def __init__(self, options: UpOptions, shared: Shared) -> None:
        self._options = options
        self._shared = shared
        self._state = _State()

    async def run(self) -> None:
        """Start, serve until a signal says stop, stop.

        Raises:
            FoundationError: it could not start; everything is stopped again.
        """
        import asyncio
        import signal

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        serving = asyncio.create_task(self._serve())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if serving.done():
            await serving
            return
        self._state.stopping = True
        if self._state.ready and self._shared.format is Output.TABLE:
            render.talk("Stopping …")
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    async def _serve(self) -> None:
        import asyncio

        if self._options.manifest is not None:
            from foundation_nats.control import manifest

            manifest.load(self._options.manifest)  # a wrong one is said before anything starts
        if self._options.reload:
            from foundation_cli import reload

            reload.check_installed()
        async with self._server() as server:
            self._state.url, self._state.store = server.url, str(server.store)
            try:
                await self._start_nodes()
                self._watch_over(server)
                await self._until_failure(self._wait_ready())
                self._state.ready = True
                self._write_file()
                if self._options.reload:
                    await self._until_failure(self._serve_reloading())
                await self._until_failure(self._deploy())
                self._announce()
                await self._until_failure(asyncio.Event().wait())
            finally:
                await self._stop_nodes()
                if self._state.file is not None:
                    runtime.remove(self._state.file)
                self._clean_logs()

    def _watch_over(self, server: EmbeddedServer) -> None:
        import asyncio

        watches = [self._watch_server(server), *map(self._watch, self._state.nodes.values())]
        self._state.watchers = [asyncio.create_task(watch) for watch in watches]

    async def _until_failure(self, work: Coroutine[Any, Any, object]) -> None:
        """Do *work*, but raise what a watcher raises meanwhile."""
        import asyncio

        task = asyncio.create_task(work)
        waiting = {task, *self._state.watchers}
        try:
            while not task.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # ---- server -----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncIterator[EmbeddedServer]:
        from foundation_nats.node.embedded import EmbeddedConfig, EmbeddedServer

        options = self._options
        config = EmbeddedConfig(
            store=options.store,
            port=options.port,
            preferred_port=PREFERRED_PORT,
            sync_interval=_SYNC_INTERVAL[options.durability],
        )
        async with EmbeddedServer(config) as server:
            # For this process and its nodes: mailboxes leave room for state commits (F8).
            os.environ.setdefault(_SIGNALS_LIMIT, str(server.signals_max_bytes))
            yield server

    async def _watch_server(self, server: EmbeddedServer) -> None:
        """Start the server again when it has ended: the store is whole, and clients reconnect.

        Raises:
            ServerError: it can't be started again.
        """
        import asyncio

        while True:
            await asyncio.sleep(_SERVER_LOOK_EVERY_S)
            if not server.is_running:
                self._report(f"The NATS server ended ({server.log_tail()}); starting it again.")
                await server.restart()

    # ---- nodes ------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What a node process finds in its environment."""
        found = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        if self._options.manifest is not None:
            paths.insert(0, str(self._options.manifest.resolve().parent))
        found["PYTHONPATH"] = os.pathsep.join(paths)
        found["FOUNDATION_SERVER"] = self._state.url
        found["FOUNDATION_CLUSTER"] = self._options.cluster
        if self._options.reload:
            # What was compiled is told from what is new by the second and by the size.
            found["PYTHONDONTWRITEBYTECODE"] = "1"
        return found

    def command(self, name: str) -> list[str]:
        """The command line of a node process."""
        options = self._options
        line = [sys.executable, "-m", "foundation_cli.main", "node", "start", "--name", name]
        line += ["--workers", str(options.workers), "--log-level", options.log_level]
        for module in options.imports:
            line += ["--import", module]
        if options.metrics is not None:
            line += ["--metrics", str(self._metrics_port(name, options.metrics))]
        return line

    @staticmethod
    def _metrics_port(name: str, first: int) -> int:
        return first + int(name.rpartition("-")[2]) - 1

    async def _start_nodes(self) -> None:
        logs = self._state.logs = runtime.make_log_dir(self._options.cluster)
        for number in range(1, self._options.nodes + 1):
            name = f"node-{number}"
            log = logs / f"{name}.log"
            process = await self._spawn(name, log)
            self._state.nodes[name] = NodeProcess(name, log, process)

    async def _spawn(self, name: str, log: Path) -> asyncio.subprocess.Process:
        import asyncio

        from foundation_nats.base.process import die_with_parent

        with log.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *self.command(name),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                # A session of its own: Ctrl-C reaches us alone, and we end it in order.
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )

    async def _wait_ready(self) -> None:
        import asyncio

        from foundation_nats.errors import NotSettledError

        names = set(self._state.nodes)
        deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        async with connected(self._own()) as cluster:
            while True:
                up = {node.name for node in await cluster.nodes.list() if node.status == "up"}
                if (
                    names <= up
                    and await cluster.leader() is not None
                    and await self._workers_are_ready(cluster)
                ):
                    return
                if asyncio.get_running_loop().time() > deadline:
                    self._state.keep_logs = True
                    missing = ", ".join(sorted(names - up)) or "a leader"
                    raise NotSettledError(
                        f"The cluster is not up after {READY_TIMEOUT_S:g} s: missing {missing}.",
                        hint=f"Logs: {self._state.logs}.",
                    )
                await asyncio.sleep(0.03)

    async def _workers_are_ready(self, cluster: Cluster) -> bool:
        """Whether every worker has imported what it must, and answers."""
        from foundation_nats.bus import rpc
        from foundation_nats.errors import BusError
        from foundation_schemas import InspectReply

        for name in self._state.nodes:
            subject = cluster.subjects.control_node(name, "inspect")
            try:
                found = await rpc.call(cluster.bus, subject, None, InspectReply, timeout=1.0)
            except BusError:
                return False
            if not all(f"{name}-w{i}" in found.details for i in range(self._options.workers)):
                return False
        return True

    async def _watch(self, node: NodeProcess) -> None:
        """Report the end of a node process that nobody asked for.

        Raises:
            ServerError: it ended before the cluster was ready.
        """
        import asyncio

        from foundation_nats.base.process import log_tail
        from foundation_nats.errors import ServerError

        while True:
            code = await node.process.wait()
            if self._state.stopping:
                return
            self._state.keep_logs = True
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if not self._state.ready:
                raise ServerError(
                    f"{node.name} {how} before it was up ({log_tail(node.log)}).",
                    hint=f"Its log: {node.log}.",
                )
            if not self._options.respawn:
                self._report(
                    f"{node.name} {how}; the cluster starts its agents elsewhere. "
                    f"Its log: {node.log}."
                )
                return
            self._report(f"{node.name} {how}; starting it again. Its log: {node.log}.")
            await asyncio.sleep(0 if node.starts == 1 else _RESPAWN_AFTER_S)
            node.process = await self._spawn(node.name, node.log)
            node.starts += 1

    def _report(self, text: str) -> None:
        if self._shared.format is Output.TABLE:
            render.talk(text)
        else:
            render.talk(render.json_text({"warning": {"code": "up.node_ended", "message": text}}))

    async def _stop_nodes(self) -> None:
        import asyncio
        import signal

        self._state.stopping = True
        for watcher in self._state.watchers:
            watcher.cancel()
        await asyncio.gather(*self._state.watchers, return_exceptions=True)
        alive = [node.process for node in self._state.nodes.values()]
        # The first SIGTERM asks to drain, the second to stop at once.
        for number, patience in (
            (signal.SIGTERM, _STOP_AGAIN_AFTER_S),
            (signal.SIGTERM, _STOP_TIMEOUT_S),
            (signal.SIGKILL, _STOP_TIMEOUT_S),
        ):
            alive = [process for process in alive if process.returncode is None]
            if not alive:
                return
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            waits = [asyncio.ensure_future(process.wait()) for process in alive]
            _, late = await asyncio.wait(waits, timeout=patience)
            for wait in late:
                wait.cancel()

    def _clean_logs(self) -> None:
        if self._state.logs is None or self._state.keep_logs:
            return
        shutil.rmtree(self._state.logs, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._state.logs.parent.rmdir()

    # ---- ready ------------------------------------------------------------------

    def _own(self) -> Shared:
        return replace(
            self._shared, server=self._state.url, cluster=self._options.cluster, context=None
        )

    def _write_file(self) -> None:
        pid = os.getpid()
        self._state.file = UpFile(
            cluster=self._options.cluster,
            url=self._state.url,
            pid=pid,
            started=runtime.process_start(pid) or "",
            store=self._state.store,
            durability=self._options.durability,
        )
        runtime.write(self._state.file)

    async def _deploy(self) -> None:
        if self._options.manifest is None:
            return
        from foundation_cli.deploy import apply_and_wait
        from foundation_nats.errors import NotSettledError

        async with connected(self._own()) as cluster:
            try:
                await apply_and_wait(
                    cluster, self._shared, self._options.manifest, self._options.wait_s
                )
            except NotSettledError as error:
                # The cluster is up and goes on trying; a look at it is worth more than its end.
                render.report(error, as_json=self._shared.format is Output.JSON)
        self._state.deployed = True

    # ---- reload -----------------------------------------------------------------

    async def _serve_reloading(self) -> None:
        """Deploy, and do so again, or run the agents anew, whenever their code changes; for ever."""
        from foundation_cli import reload

        options = self._options
        runs = reload.runs_of(options.manifest, options.imports)
        folders = [path.resolve() for path in options.watch]
        folders = folders or reload.directories(runs, options.manifest) or [Path.cwd()]
        ignore = [Path(self._state.store), runtime.runtime_dir()]
        watcher = reload.Watcher(folders, options.manifest, ignore)
        async with watcher.open(), connected(self._own()) as cluster:
            reload.Troubles(cluster).open()
            await self._deploy_again()
            self._announce(folders)
            left: tuple[Path, ...] = ()
            while True:
                batch = await watcher.next()
                # What was refused may fit a manifest that is saved after it.
                files = tuple(sorted({*left, *batch.code}))
                if files:
                    left = () if await self._reload(cluster, files) else files
                if batch.is_manifest_changed or not self._state.deployed:
                    await self._deploy_again()

    async def _deploy_again(self) -> None:
        from foundation_cli import reload
        from foundation_nats.errors import FoundationError

        self._state.deployed = False
        try:
            await self._deploy()
        except FoundationError as error:
            reload.warn(f"Not deployed: {reload.wrong(error)}\nIt is tried again after a change.")

    async def _reload(self, cluster: Cluster, files: Sequence[Path]) -> bool:
        """Run the agents with what is in *files* now; whether they do."""
        from foundation_cli import reload
        from foundation_nats.errors import FoundationError

        found: dict[str, object] = {
            "schema": f"{render.SCHEMA}/reload",
            "files": [str(path) for path in files],
        }
        why = reload.broken(files)
        if why is None:
            nodes = [n.name for n in self._state.nodes.values() if n.process.returncode is None]
            try:
                runs = reload.runs_of(self._options.manifest, self._options.imports)
                done = await reload.reload(cluster, nodes, runs)
            except FoundationError as error:
                why = reload.wrong(error)
        if why is not None:
            found |= {"ok": False, "error": why}
        else:
            found |= {"ok": True, "agents": done.agents, "forced": list(done.forced)}
            found["seconds"] = round(done.seconds, 3)
        if self._shared.format is not Output.TABLE:
            render.print_line(found)
        elif why is not None:
            reload.warn(f"{why}\nThe code from before goes on.")
        else:
            agents = "1 agent" if done.agents == 1 else f"{done.agents} agents"
            render.talk(
                f"Reloaded {reload.names(files)}: {agents}, {done.seconds:.1f} s."
                + (f" Ended in the middle: {', '.join(done.forced[:5])}." if done.forced else "")
            )
        return why is None

    def _announce(self, watched: Sequence[Path] = ()) -> None:
        state, options = self._state, self._options
        names = list(state.nodes)
        ports = (
            {}
            if options.metrics is None
            else {name: self._metrics_port(name, options.metrics) for name in names}
        )
        metrics = {name: f"http://127.0.0.1:{port}/metrics" for name, port in ports.items()}
        found = {
            "schema": f"{render.SCHEMA}/up",
            "cluster": options.cluster,
            "url": state.url,
            "pid": os.getpid(),
            "nodes": names,
            "store": state.store,
            "temporary": options.store is None,
            "logs": str(state.logs),
            **({"metrics": metrics} if metrics else {}),
            **({"watched": [str(path) for path in watched]} if watched else {}),
        }
        if self._shared.format is not Output.TABLE:
            # One line, so that a script can read it while `up` goes on.
            render.print_line(found)
            return
        kept = state.store if options.store else "gone when this ends (--store DIR keeps it)"
        render.write(f"Cluster {options.cluster} is up at {state.url}")
        render.write(f"nodes   {', '.join(names)}, {options.workers} worker(s) each")
        render.write(f"data    {kept}")
        render.write(f"logs    {state.logs}")
        if metrics:
            render.write(f"metrics {', '.join(metrics.values())}")
        if watched:
            render.write(f"reload  when code changes in {', '.join(map(str, watched))}")
        render.write("Try, in another terminal:")
        for words in self._suggestions():
            render.write(f"  foundation {self._flags()}{words}")
        render.write("Ctrl-C stops everything.")

    def _suggestions(self) -> tuple[str, ...]:
        if self._options.manifest is None:
            return ("status", "deploy agents.yaml", "tap")
        return ("status", "agents", "tap")

    def _flags(self) -> str:
        """What another terminal must add to find this cluster."""
        with contextlib.suppress(Exception):
            found = resolve(Shared())
            if found.urls == (self._state.url,) and found.cluster == self._options.cluster:
                return ""
        flags = f"-s {self._state.url} "
        if self._options.cluster != DEFAULT_CLUSTER:
            flags += f"-c {self._options.cluster} "
        return flags


def default_workers(nodes: int) -> int:
    """The cores shared among the nodes, at least one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // nodes)


@with_shared
def up(
    shared: Shared,
    manifest: Annotated[
        Path | None,
        typer.Argument(metavar="[MANIFEST]", help="Deploy this too.", exists=True, dir_okay=False),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", "-n", metavar="N", min=1, max=64, help="Node processes.")
    ] = 2,
    workers: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, max=1024, help="Workers per node (cores / nodes)."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the data here.", file_okay=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=65535, help=f"Exactly this port ({PREFERRED_PORT} if free)."
        ),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Nodes import it; may be repeated."),
    ] = None,
    durability: Annotated[
        Durability,
        typer.Option(
            metavar="process|interval|always",
            help="A power cut loses: up to 2 minutes, up to 100 ms, nothing (slow).",
        ),
    ] = Durability.INTERVAL,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="DURATION",
            parser=values.duration,
            help="How long to wait for the manifest's agents.",
            show_default="30s",
        ),
    ] = "30s",  # type: ignore[assignment]
    respawn: Annotated[
        bool, typer.Option("--respawn", help="Start a node again that has died.")
    ] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Run agents with new code when it changes.")
    ] = False,
    watch: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="With --reload: watch this instead of the code's own folders; may be repeated.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=1,
            max=65535 - 64,
            help="Serve metrics to Prometheus: the first node here, the others on the next ports.",
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Of the nodes: debug, info, warning, error.")
    ] = "info",
) -> None:
    """Start a cluster here: server, nodes and agents.

    Example: foundation up agents.yaml --nodes 2 --store ./data
    """
    if shared.server or shared.context or shared.creds:
        raise typer.BadParameter(
            "`up` starts a server of its own; use `foundation node start` to join another."
        )
    cluster = _cluster_name(shared, os.environ)
    options = UpOptions(
        cluster=cluster,
        nodes=nodes,
        workers=workers or default_workers(nodes),
        store=store,
        port=port,
        imports=tuple(imports or ()),
        durability=durability,
        manifest=manifest,
        wait_s=wait,
        respawn=respawn,
        log_level=log_level,
        metrics=metrics,
        reload=reload,
        watch=tuple(watch or ()),
    )
    run(lambda: Up(options, shared).run())


def _cluster_name(shared: Shared, environment: Mapping[str, str]) -> str:
    from foundation_schemas.base import is_name

    name = shared.cluster or environment.get("FOUNDATION_CLUSTER") or DEFAULT_CLUSTER
    if not is_name(name):
        raise typer.BadParameter(
            f"{name!r} is not a cluster name: use letters, digits, '-' and '_'.",
            param_hint="--cluster",
        )
    return name


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(up)
