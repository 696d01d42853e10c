"""Counts what a Python source tree consists of, file by file, and adds it up.

`analyse_source` and the models are pure; `find_files`, `analyse_file` and
`census_directly` read the file system and write nothing.

Reports may be added in any order and any grouping: the result, and so its
digest, is the same. A report that is missing or added twice changes both the
numbers and `fingerprint`, even if two files happen to have equal numbers. That
is what makes the comparison with a census taken in one process a proof.

Guaranteed for equal bytes and an equal Python version; another version may
parse other files. A file that does not parse is counted with its lines and its
error, never dropped.
"""

from __future__ import annotations

import ast
import hashlib
import os
import stat
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import orjson
from pydantic import BaseModel, ConfigDict, Field

from foundation_nats import Payload

FILES_MAX = 100_000
FILE_BYTES_MAX = 8 * 1024 * 1024
ERROR_TEXT_MAX = 200
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "dist-packages", "node_modules", "site-packages"})

# JSON readers outside Python keep integers exactly only up to 2**53.
FINGERPRINT_MODULUS = 2**53


class Function(BaseModel):
    """Where a function is and how many lines it has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    line: int
    name: str
    """Qualified within its file, as in ``Parser.parse``."""
    lines: int
    """From ``def`` to its last line; decorators are not counted."""


class FileReport(Payload, type="census.report"):
    """What one file consists of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative to the tree's root, with slashes."""
    package: str
    """The first part of the path; for a file at the root its name without ``.py``."""
    lines: int
    code_lines: int
    """Lines that are neither blank nor a comment only."""
    functions: int = 0
    """All of them: methods, coroutines, nested ones."""
    classes: int = 0
    imports: int = 0
    """Import statements, wherever they stand."""
    longest_function: Function | None = None
    error: str | None = None
    """Why the file could not be parsed or read; then only its lines are counted."""

    def fingerprint(self) -> int:
        """A number that is practically unique to this report."""
        digest = hashlib.sha256(_canonical(self)).digest()
        return int.from_bytes(digest[:8]) % FINGERPRINT_MODULUS


class PackageTotals(BaseModel):
    """The sum of the reports of one package, or of everything."""

    model_config = ConfigDict(extra="forbid")

    package: str
    files: int = 0
    lines: int = 0
    code_lines: int = 0
    functions: int = 0
    classes: int = 0
    imports: int = 0
    unparsed: int = 0
    longest_function: Function | None = None

    def add(self, report: FileReport) -> None:
        """Count one file."""
        self.files += 1
        self.lines += report.lines
        self.code_lines += report.code_lines
        self.functions += report.functions
        self.classes += report.classes
        self.imports += report.imports
        self.unparsed += report.error is not None
        self.longest_function = _longer(self.longest_function, report.longest_function)

    def merge(self, other: PackageTotals) -> None:
        """Count what `other` has counted."""
        self.files += other.files
        self.lines += other.lines
        self.code_lines += other.code_lines
        self.functions += other.functions
        self.classes += other.classes
        self.imports += other.imports
        self.unparsed += other.unparsed
        self.longest_function = _longer(self.longest_function, other.longest_function)


class Census(BaseModel):
    """The totals per package, and a fingerprint of every report that is in them."""

    model_config = ConfigDict(extra="forbid")

    packages: dict[str, PackageTotals] = Field(default_factory=dict)
    fingerprint: int = 0
    """The sum of the reports' fingerprints, modulo 2**53."""

    def add(self, report: FileReport) -> None:
        """Count one file; twice, if it is added twice."""
        self._package(report.package).add(report)
        self.fingerprint = (self.fingerprint + report.fingerprint()) % FINGERPRINT_MODULUS

    def merge(self, other: Census) -> None:
        """Count what `other` has counted; `other` stays as it is."""
        for name, totals in other.packages.items():
            self._package(name).merge(totals)
        self.fingerprint = (self.fingerprint + other.fingerprint) % FINGERPRINT_MODULUS

    def totals(self) -> PackageTotals:
        """The sum of all packages."""
        everything = PackageTotals(package="total")
        for totals in self.packages.values():
            everything.merge(totals)
        return everything

    def largest(self) -> list[PackageTotals]:
        """All packages, the one with the most lines first."""
        return sorted(self.packages.values(), key=lambda totals: (-totals.lines, totals.package))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal digests mean equal censuses."""
        return hashlib.sha256(_canonical(self)).hexdigest()

    def _package(self, name: str) -> PackageTotals:
        totals = self.packages.get(name)
        if totals is None:
            totals = self.packages[name] = PackageTotals(package=name)
        return totals


def standard_library() -> str:
    """The directory of the standard library of the Python that runs this."""
    return sysconfig.get_paths()["stdlib"]


def find_files(root: str | os.PathLike[str], *, files_max: int = FILES_MAX) -> list[str]:
    """The paths of all ``.py`` files below `root`, relative, with slashes, sorted.

    Left out are hidden and installed directories (`SKIPPED_DIRECTORIES`), what
    cannot be read, names that are not Unicode, and symbolic links: what they
    point to is counted where it lives, so a loop of links has no end to find.

    Raises:
        NotADirectoryError: `root` is not a directory.
        ValueError: there are more than `files_max` files.
    """
    base = os.path.realpath(root)
    if not os.path.isdir(base):
        raise NotADirectoryError(f"{os.fspath(root)!r} is not a directory; give one with sources")
    found: list[str] = []
    for directory, directories, names in os.walk(base, followlinks=False):
        directories[:] = sorted(name for name in directories if _is_counted(name))
        for name in names:
            path = os.path.join(directory, name)
            if name.endswith(".py") and _is_readable_file(path):
                found.append(os.path.relpath(path, base).replace(os.sep, "/"))
        if len(found) > files_max:
            raise ValueError(
                f"{base!r} holds more than {files_max} Python files; choose a part of it"
            )
    return sorted(found)


def analyse_file(root: str | os.PathLike[str], path: str) -> FileReport:
    """Read the file at `path` below `root` and analyse it; an unreadable one is reported so."""
    file = Path(root, path)
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            return _unparsed(path, b"", f"larger than {FILE_BYTES_MAX} bytes")
        source = file.read_bytes()
    except OSError as error:
        return _unparsed(path, b"", f"cannot be read: {error.strerror}")
    return analyse_source(path, source)


def analyse_source(path: str, source: bytes) -> FileReport:
    """Parse one file, in the encoding it declares, and count what is in it."""
    try:
        with warnings.catch_warnings():
            # Old sources have invalid escapes; as errors these would change the census.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError as error:
        where = f" (line {error.lineno})" if error.lineno else ""
        return _unparsed(path, source, f"{error.msg}{where}")
    except (RecursionError, MemoryError):
        return _unparsed(path, source, "nested too deeply")
    except ValueError as error:
        return _unparsed(path, source, str(error))

    functions = classes = imports = 0
    longest: Function | None = None
    for statement, name in _statements(tree):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                functions += 1
                line, last_line = statement.lineno, statement.end_lineno
                assert last_line is not None
                function = Function(path=path, line=line, name=name, lines=last_line - line + 1)
                longest = _longer(longest, function)
            case ast.ClassDef():
                classes += 1
            case ast.Import() | ast.ImportFrom():
                imports += 1
            case _:
                pass
    lines, code_lines = _count_lines(source)
    return FileReport(
        path=path,
        package=_package_of(path),
        lines=lines,
        code_lines=code_lines,
        functions=functions,
        classes=classes,
        imports=imports,
        longest_function=longest,
    )


def census_directly(
    root: str | os.PathLike[str], on_report: Callable[[FileReport], None] | None = None
) -> Census:
    """The whole census in this process, one file after the other.

    Raises:
        NotADirectoryError: `root` is not a directory.
        ValueError: there are more than `FILES_MAX` files.
    """
    census = Census()
    for path in find_files(root):
        report = analyse_file(root, path)
        census.add(report)
        if on_report is not None:
            on_report(report)
    return census


def _statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every statement with the qualified name of the definition it is or stands in.

    Expressions are not entered: no statement stands in one, and they are most of
    the tree. A list instead of recursion: sources may be nested more deeply than
    our stack.
    """
    blocks: list[tuple[Sequence[ast.AST], str]] = [(tree.body, "")]
    while blocks:
        block, outer = blocks.pop()
        for node in block:
            name = outer
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{node.name}" if outer else node.name
            if isinstance(node, ast.stmt):
                yield node, name
            # Handlers and cases are no statements, but hold some.
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, field, None)
                if inner:
                    blocks.append((inner, name))


def _longer(first: Function | None, second: Function | None) -> Function | None:
    """The longer one; of equally long ones the first by path, line and name."""
    if first is None or second is None:
        return first or second
    return min(first, second, key=lambda f: (-f.lines, f.path, f.line, f.name))


def _unparsed(path: str, source: bytes, error: str) -> FileReport:
    # The text may quote the source, and that may hold what no JSON can carry.
    text = error.encode("utf-8", "replace").decode()[:ERROR_TEXT_MAX]
    lines, code_lines = _count_lines(source)
    return FileReport(
        path=path,
        package=_package_of(path),
        lines=lines,
        code_lines=code_lines,
        error=text or "unknown error",
    )


def _count_lines(source: bytes) -> tuple[int, int]:
    """All lines, and those that are neither blank nor a comment only."""
    lines = source.splitlines()
    code = sum(1 for line in map(bytes.strip, lines) if line and not line.startswith(b"#"))
    return len(lines), code


def _package_of(path: str) -> str:
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else PurePosixPath(path).stem


def _is_counted(directory_name: str) -> bool:
    return directory_name not in SKIPPED_DIRECTORIES and not directory_name.startswith(".")


def _is_readable_file(path: str) -> bool:
    try:
        path.encode()
        mode = os.lstat(path).st_mode
    except (OSError, UnicodeEncodeError):
        return False
    return stat.S_ISREG(mode) and os.access(path, os.R_OK)


def _canonical(model: BaseModel) -> bytes:
    return orjson.dumps(model.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)
